import json
from itertools import permutations

import pytest
import torch

from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet, load_controlnet
from prompt_diffusion.model.look_up.color_fit import (
    compute_moments,
    fit_globally,
    fit_locally,
    recolor_globally,
    recolor_locally,
)
from prompt_diffusion.model.look_up.look_up import LookUp
from prompt_diffusion.model.look_up.matching import Matching, sum_regardless_of_order
from prompt_diffusion.model.original.export import export_checkpoint

STEMS = (4, 8, 8)
TINY = {"channels": (8, 16), "patch_size": 2, "context_channels": 16, "decoder_channels": (8, 16), "num_heads": 2}


def build_look_up(seed=0, std=None, **changes):
    """Return a tiny look-up, every weight random where ``std`` is given: a fresh one has zeros in it."""
    torch.manual_seed(seed)
    look_up = LookUp(**(TINY | {"norm_groups": 4} | changes)).eval()
    if std is not None:
        for parameter in look_up.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return look_up


def draw_pictures(count, seed=0, size=(32, 32)):
    """Return ``count`` smooth pictures, N, 3, H, W in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")


@pytest.fixture
def base(tiny_base):
    return load_base(tiny_base)


def test_a_fresh_look_up_leaves_the_stems_model_as_it_is_bit_for_bit(base):
    look_up = build_look_up(std=0.3)
    torch.manual_seed(1)
    plain = PromptDiffusionControlNet.from_unet(base.unet, STEMS)
    torch.manual_seed(1)
    entered = PromptDiffusionControlNet.from_unet(base.unet, STEMS, look_up=look_up)
    for controlnet in (plain, entered):  # a trained stem
        torch.nn.init.constant_(controlnet.example_stem.conv_out.weight, 0.3)
    assert plain.state_dict().keys() < entered.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, entered.state_dict()[name]), name
    pair, query = draw_pictures(2).repeat(1, 2, 1, 1), draw_pictures(2, seed=1)
    for given in (pair, [pair, pair.flip(1)], None):
        assert torch.equal(
            plain.compute_condition_features(given, query), entered.compute_condition_features(given, query)
        )


def test_a_model_without_a_look_up_is_written_as_before_there_were_any(base, tmp_path):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS)
    controlnet.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert sorted(name for name in written if not name.startswith("_")) == [
        "example_pair", "stem_channels", "trunk_config", "unit_query"
    ]  # fmt: skip
    assert not any(name.startswith("look_up") for name in controlnet.state_dict())
    assert load_controlnet(tmp_path, example_pair=True).look_up is None


@torch.no_grad()
def test_a_model_with_a_look_up_comes_back_with_every_weight(base, tmp_path):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS, look_up=build_look_up(std=0.3)).eval()
    for parameter in controlnet.look_up.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    controlnet.save_pretrained(tmp_path, safe_serialization=True)
    loaded = load_controlnet(tmp_path, example_pair=True).eval()
    pair, query = draw_pictures(1).repeat(1, 2, 1, 1), draw_pictures(2, seed=1)
    assert torch.equal(
        loaded.compute_condition_features(pair, query), controlnet.compute_condition_features(pair, query)
    )
    baseline = load_controlnet(tmp_path, example_pair=False)
    assert baseline.look_up is None
    assert torch.equal(baseline.query_stem.conv_in.weight, controlnet.query_stem.conv_in.weight)


@torch.no_grad()
def test_a_look_up_is_saved_and_loaded_on_its_own(tmp_path):
    look_up = build_look_up(std=0.2)
    look_up.save_pretrained(tmp_path, safe_serialization=True)
    loaded = LookUp.from_pretrained(tmp_path)
    source, target, query = draw_pictures(1), draw_pictures(1, 1), draw_pictures(2, 2)
    drafts = [each.draft([(source, target)], query) for each in (look_up, loaded)]
    assert (drafts[0].images == drafts[1].images).all()
    assert drafts[0].images.shape == (2, 32, 32, 3)
    assert drafts[0].images.dtype.name == "uint8"
    assert drafts[0].null_share.shape == (2, 8, 8)
    assert bool(((drafts[0].null_share > 0) & (drafts[0].null_share < 1)).all())


@torch.no_grad()
def test_the_order_of_pairs_plays_no_part_to_the_last_bit(base):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS, look_up=build_look_up(std=0.3)).eval()
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pairs, query = [draw_pictures(1, seed).repeat(1, 2, 1, 1) for seed in range(3)], draw_pictures(2, 9)
    features = [controlnet.compute_condition_features(list(order), query) for order in permutations(pairs)]
    assert all(torch.equal(each, features[0]) for each in features)
    one = controlnet.compute_condition_features(pairs[0], query)
    assert torch.equal(controlnet.compute_condition_features(pairs[:1], query), one)
    assert not torch.allclose(features[0], one)
    drafts = [controlnet.draft(list(order), query) for order in permutations(pairs)]
    assert all((each.images == drafts[0].images).all() for each in drafts)


@torch.no_grad()
def test_no_pair_finds_the_null_key_alone_and_so_does_a_dropped_one(base):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS, look_up=build_look_up()).eval()
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pair, query = draw_pictures(2).repeat(1, 2, 1, 1), draw_pictures(2, seed=1)
    kept = controlnet.compute_condition_features(pair, query)
    none = controlnet.compute_condition_features(None, query)
    some = controlnet.compute_condition_features(pair, query, torch.tensor([True, False]))
    torch.testing.assert_close(some[0], kept[0])
    torch.testing.assert_close(some[1], none[1])
    assert not torch.allclose(kept, none)
    network = controlnet.look_up.network
    features = network.encoder(query)[0]
    match = network.match(features, [features], torch.tensor([True, False]))
    assert bool((match.null_share[1] == 1).all())
    assert float(match.weights[0][1].abs().max()) == 0.0
    assert bool((match.null_share[0] < 1).all())


@torch.no_grad()
def test_weights_sum_to_one_and_entropy_is_that_of_the_weights():
    torch.manual_seed(0)
    matching = Matching(16, 2)
    torch.nn.init.normal_(matching.position_bias[2].weight)
    query, sources = torch.randn(2, 16, 3, 4), [torch.randn(1, 16, 3, 4), torch.randn(2, 16, 3, 4)]
    match = matching(query, sources)
    weights = torch.cat([*match.weights, match.null_weights[..., None]], dim=-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 12))
    entropy = torch.special.entr(weights).sum(-1).mean(1) / torch.tensor(25.0).log()
    torch.testing.assert_close(match.entropy.flatten(1), entropy)
    # by hand: the weights of one place, times the values of all places
    values = [torch.randn(2, 6, 3, 4) for _ in sources]
    expected = sum(
        (weight[:, 1, 5] * value.flatten(2)[:, 3]).sum(-1) for weight, value in zip(match.weights, values, strict=True)
    )
    torch.testing.assert_close(match.look_up(values).flatten(2)[:, 3, 5], expected)


def test_a_sum_does_not_depend_on_the_order_and_one_is_itself():
    parts = [torch.randn(2, 3, 4) * 10.0**power for power in (-3, 0, 4)]
    sums = [sum_regardless_of_order(list(order)) for order in permutations(parts)]
    assert all(torch.equal(each, sums[0]) for each in sums)
    assert sum_regardless_of_order(parts[:1]) is parts[0]


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 48), (48, 24)])
def test_any_size_and_aspect_is_read(size):
    look_up = build_look_up(std=0.2)
    source, target, query = (draw_pictures(1, seed, size) for seed in range(3))
    features, draft, match = look_up([(source, target)], query)
    assert features.shape == (1, look_up.read_out_channels + 16, size[0] // 4, size[1] // 4)
    assert draft.shape == query.shape
    assert match.null_share.shape == (1, 1, size[0] // 4, size[1] // 4)
    with pytest.raises(ValueError, match="multiples of 4, not 30 x 32"):
        look_up([(query[..., :30, :30],) * 2], torch.zeros(1, 3, 32, 30))


@torch.no_grad()
def test_a_larger_picture_of_the_same_is_matched_alike():
    """Position bias and null key are relative to the picture: twice the places, the same shares and the same read-out."""
    torch.manual_seed(0)
    matching = Matching(16, 2)
    torch.nn.init.normal_(matching.position_bias[2].weight, std=2.0)
    coarse = [
        torch.nn.functional.interpolate(torch.randn(1, 16, 3, 3), size=(16, 16), mode="bicubic") for _ in range(2)
    ]
    fine = [torch.nn.functional.interpolate(each, size=(32, 32), mode="bilinear") for each in coarse]
    small, large = (matching(query, [source]) for query, source in (coarse, fine))
    shares = [small.null_share, torch.nn.functional.avg_pool2d(large.null_share, 2)]
    assert 0.02 < float(shares[0].mean()) < 0.98
    assert float((shares[0] - shares[1]).abs().mean()) < 0.02
    found = [match.look_up([source]) for match, (_, source) in ((small, coarse), (large, fine))]
    found[1] = torch.nn.functional.avg_pool2d(found[1], 2)
    assert float((found[0] - found[1]).abs().mean()) < 0.05 * float(found[0].abs().mean())


def test_after_one_step_every_weight_has_a_gradient(base):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS, look_up=build_look_up(std=0.2))
    pair, query, goal = draw_pictures(2).repeat(1, 2, 1, 1), draw_pictures(2, seed=1), torch.randn(2, 16, 8, 8)
    optimizer = torch.optim.SGD(controlnet.look_up.parameters(), lr=1.0)
    for _ in range(2):
        controlnet.zero_grad()
        (controlnet.compute_condition_features(pair, query) - goal).square().mean().backward()
        optimizer.step()
    silent = [name for name, p in controlnet.look_up.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_a_look_up_that_does_not_fit_is_refused_with_both_values(base):
    with pytest.raises(ValueError, match="shrinks an image 8 times, the stems 4 times"):
        PromptDiffusionControlNet.from_unet(base.unet, STEMS, look_up=build_look_up(patch_size=4))
    with pytest.raises(ValueError, match="takes a query alone"):
        PromptDiffusionControlNet.from_unet(base.unet, STEMS, example_pair=False, look_up=build_look_up())
    with pytest.raises(ValueError, match=r"channels \(8, 16\) and decoder_channels \(8,\)"):
        build_look_up(decoder_channels=(8,))


def test_without_a_decoder_there_are_features_and_no_draft(base):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS, look_up=build_look_up(has_decoder=False))
    pair, query = draw_pictures(1).repeat(1, 2, 1, 1), draw_pictures(2, seed=1)
    assert controlnet.compute_condition_features(pair, query).shape == (2, 16, 8, 8)
    with pytest.raises(ValueError, match="no decoder"):
        controlnet.draft(pair, query)
    with pytest.raises(ValueError, match="no look-up"):
        PromptDiffusionControlNet.from_unet(base.unet, STEMS).draft(pair, query)


def test_the_original_layout_refuses_a_look_up(base, tmp_path):
    base.save(tmp_path / "model")
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS, look_up=build_look_up())
    controlnet.save_pretrained(tmp_path / "model" / "controlnet")
    with pytest.raises(ValueError, match="cannot express a look-up"):
        export_checkpoint(tmp_path / "model", tmp_path / "out.safetensors")


SLOPE = torch.tensor([[0.3, -0.4, 0.1], [0.0, 0.5, 0.3], [-0.6, 0.1, 0.2]])
OFFSET = torch.tensor([0.1, -0.15, 0.05])


def recolor(image):
    return torch.einsum("ij,njhw->nihw", SLOPE, image) + OFFSET[:, None, None]


@torch.no_grad()
def test_an_affine_recolouring_is_fitted_exactly_globally_and_locally():
    source, query = draw_pictures(2), draw_pictures(2, seed=1)
    moments = compute_moments(source, recolor(source), 4)
    whole, mean = fit_globally([moments])
    torch.testing.assert_close(whole.slope, SLOPE.expand(2, 3, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(whole.offset, OFFSET.expand(2, 3), atol=1e-3, rtol=0)
    assert float(whole.error.max()) < 1e-3
    torch.testing.assert_close(recolor_globally(query, whole), recolor(query), atol=2e-3, rtol=0)
    match = Matching(8, 2)(torch.randn(2, 8, 8, 8), [torch.randn(2, 8, 8, 8)])
    local = fit_locally([moments], match, whole, mean)
    torch.testing.assert_close(recolor_locally(query, local), recolor(query), atol=5e-3, rtol=0)
    assert float(local.error.max()) < 5e-3


@torch.no_grad()
def test_where_places_are_recoloured_otherwise_the_local_fit_is_right_and_the_global_one_is_not():
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1  # both halves show every colour
    source, query = torch.nn.functional.interpolate(colors, size=(32, 32)).split(1)
    is_left = torch.arange(32) < 16
    change = lambda image: torch.where(is_left, recolor(image), -image)  # noqa: E731
    moments = compute_moments(source, change(source), 4)
    whole, mean = fit_globally([moments])
    assert float(whole.error) > 0.1
    match = Matching(8, 2)(torch.randn(1, 8, 8, 8), [torch.randn(1, 8, 8, 8)])
    columns = torch.arange(64) % 8 < 4  # each half finds its own half
    same_half = (columns[:, None] == columns[None]).float() / 32
    match.weights[0][:] = same_half
    local = fit_locally([moments], match, whole, mean)
    inner = [*range(12), *range(20, 32)]  # maps are interpolated across the border
    torch.testing.assert_close(recolor_locally(query, local)[..., inner], change(query)[..., inner], atol=0.05, rtol=0)
    assert float(local.error.max()) < 0.1


@torch.no_grad()
def test_without_a_pair_the_fit_is_mid_grey_and_says_so():
    source = draw_pictures(2)
    moments = compute_moments(source, recolor(source), 4, torch.tensor([True, False]))
    whole, _ = fit_globally([moments])
    assert not recolor_globally(source, whole)[1].any()
    assert float(whole.error[1]) == 1.0
