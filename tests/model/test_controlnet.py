import pytest
import torch
from diffusers import ControlNetModel

from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import (
    PromptDiffusionControlNet,
    check_controlnet,
    load_controlnet,
    predict_noise,
    trained_unet_parameters,
)

STEMS = (4, 8, 8)


@pytest.fixture
def base(tiny_base):
    return load_base(tiny_base)


def draw_inputs(count=2):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "latents": (count, 4, 8, 8),
        "text": (count, 24, 16),
        "pair": (count, 6, 32, 32),
        "query": (count, 3, 32, 32),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_fresh_controlnet_leaves_the_base_as_it_is(base):
    x, steps = draw_inputs(), torch.tensor([10, 900])
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS)
    features = controlnet.compute_condition_features(x["pair"], x["query"])
    with torch.no_grad():
        steered = predict_noise(base.unet, controlnet, x["latents"], steps, x["text"], features)
        plain = base.unet(x["latents"], steps, x["text"]).sample
    torch.testing.assert_close(steered, plain, rtol=0, atol=0)


def test_the_trunk_is_a_copy_of_the_encoder(base):
    trunk = PromptDiffusionControlNet.from_unet(base.unet, STEMS).trunk.state_dict()
    encoder = {
        k: v for k, v in base.unet.state_dict().items() if k.startswith(("conv_in", "time_emb", "down_blocks", "mid_"))
    }
    assert encoder
    for name, value in encoder.items():
        torch.testing.assert_close(trunk[name], value, rtol=0, atol=0)


def test_features_are_the_sum_of_both_stems_and_enter_after_the_first_convolution(base):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS)
    torch.manual_seed(1)
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = draw_inputs()
    features = controlnet.compute_condition_features(x["pair"], x["query"])
    torch.testing.assert_close(features, controlnet.example_stem(x["pair"]) + controlnet.query_stem(x["query"]))
    down, _ = controlnet(x["latents"], torch.tensor([5, 5]), x["text"], features)
    entering = controlnet.trunk.conv_in(x["latents"]) + features
    torch.testing.assert_close(down[0], controlnet.trunk.controlnet_down_blocks[0](entering))


def test_no_pair_is_a_grey_pair_and_the_pair_matters(base):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS)
    torch.nn.init.normal_(controlnet.example_stem.conv_out.weight)
    x = draw_inputs()
    none = controlnet.compute_condition_features(None, x["query"])
    grey = controlnet.compute_condition_features(torch.zeros_like(x["pair"]), x["query"])
    torch.testing.assert_close(none, grey, rtol=0, atol=0)
    assert not torch.allclose(none, controlnet.compute_condition_features(x["pair"], x["query"]))


def test_a_baseline_reads_the_query_alone(base):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS, example_pair=False)
    assert not controlnet.uses_example_pair
    with pytest.raises(ValueError, match="takes a query alone"):
        controlnet.compute_condition_features(draw_inputs()["pair"], draw_inputs()["query"])


def test_saved_weights_come_back(base, tmp_path):
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, STEMS)
    controlnet.save_pretrained(tmp_path, safe_serialization=True)
    assert not list(tmp_path.glob("*.bin"))
    loaded = PromptDiffusionControlNet.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == controlnet.state_dict().keys()
    for name, value in controlnet.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def test_the_decoder_and_nothing_else_of_the_unet_is_trained(base):
    names = set(trained_unet_parameters(base.unet))
    assert names
    assert {name.split(".")[0] for name in names} == {"up_blocks", "conv_norm_out", "conv_out"}


def test_published_stems_are_those_of_sd_size():
    """16, 16, 32/2, 32, 96/2, 96, 256/2, then zero to the trunk's width: eight convolutions, three of stride two."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=32, block_out_channels=(320, 640), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=768, attention_head_dim=8,
        )  # fmt: skip
        stem = PromptDiffusionControlNet(
            {k: v for k, v in controlnet_config(unet).items() if not k.startswith("_")}
        ).example_stem
    convolutions = [m for m in stem.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [
        (6, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2), (256, 320, 1),
    ]  # fmt: skip


def controlnet_config(unet):
    return ControlNetModel.from_unet(unet, load_weights_from_unet=False).config


@pytest.fixture
def public(base):
    """A diffusers ControlNet of the base's architecture, every weight random: what a public one is to SD v1.5."""
    torch.manual_seed(3)
    source = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=STEMS)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return source


def compare_with_public(source, controlnet, x):
    """Both on the same query: ours in [-1, 1], diffusers' in [0, 1]."""
    steps = torch.tensor([10, 900])
    query = x["query"].tanh()
    theirs, their_middle = source(x["latents"], steps, x["text"], (query + 1) / 2, return_dict=False)
    features = controlnet.compute_condition_features(x["pair"], query)
    ours, our_middle = controlnet(x["latents"], steps, x["text"], features)
    for one, other in zip([*ours, our_middle], [*theirs, their_middle], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_public_controlnet_is_taken_over_exactly_up_to_the_borders(public, order, tmp_path):
    public.register_to_config(controlnet_conditioning_channel_order=order)
    public.save_pretrained(tmp_path, safe_serialization=True)
    controlnet = load_controlnet(tmp_path, example_pair=True)
    x = draw_inputs()
    compare_with_public(public, controlnet, x)
    # a fold into the first convolution would be wrong where its padding is seen
    controlnet.register_to_config(unit_query=False)
    stem = controlnet.query_stem.conv_in
    stem.bias += stem.weight.sum((1, 2, 3)) / 2
    stem.weight /= 2
    folded = controlnet.query_stem(x["query"].tanh())
    query = (x["query"].tanh() + 1) / 2
    true = public.controlnet_cond_embedding(query.flip(1) if order == "bgr" else query)
    assert (folded - true).abs()[..., 0].max() > 1e-2  # the first column
    torch.testing.assert_close(folded[..., 3:-3, 3:-3], true[..., 3:-3, 3:-3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_that_began_as_a_public_controlnet_is_saved_with_its_query_range(public, tmp_path):
    PromptDiffusionControlNet.from_controlnet(public, example_pair=False).save_pretrained(tmp_path)
    compare_with_public(public, load_controlnet(tmp_path, example_pair=False), draw_inputs() | {"pair": None})
    compare_with_public(public, load_controlnet(tmp_path, example_pair=True), draw_inputs())


def test_going_on_from_ours_keeps_every_weight_and_a_baseline_leaves_the_example_stem_away(base, tmp_path):
    torch.manual_seed(5)
    ours = PromptDiffusionControlNet.from_unet(base.unet, STEMS)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    ours.save_pretrained(tmp_path)
    same, baseline = load_controlnet(tmp_path, example_pair=True), load_controlnet(tmp_path, example_pair=False)
    for name, value in ours.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
        assert name.startswith("example_stem.") or torch.equal(baseline.state_dict()[name], value)
    assert not baseline.uses_example_pair


@pytest.mark.parametrize(
    ("change", "stems", "sentence"),
    [
        (
            {"cross_attention_dim": 32},
            STEMS,
            "has cross_attention_dim 32, but the base's UNet has 16",
        ),
        (
            {"block_out_channels": (16, 32)},
            STEMS,
            r"has block_out_channels \(16, 32\), but the base's UNet has \(16, 16\)",
        ),
        (
            {},
            (16, 32, 96, 256),
            r"has stem channels \(4, 8, 8\), but the recipe's stem_channels are \(16, 32, 96, 256\)",
        ),
    ],
)
def test_a_controlnet_of_another_architecture_is_refused_with_both_values(base, change, stems, sentence, tmp_path):
    config = controlnet_config(base.unet) | {"conditioning_embedding_out_channels": STEMS} | change
    ControlNetModel(**{k: v for k, v in config.items() if not k.startswith("_")}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        check_controlnet(load_controlnet(tmp_path, example_pair=True), base.unet, stems)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_no_controlnet_is_refused_by_what_it_holds(base, tmp_path):
    base.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it holds 'UNet2DConditionModel', not 'ControlNetModel'"):
        load_controlnet(tmp_path, example_pair=True)
    with pytest.raises(ValueError, match=r"no ControlNet can be loaded from .*nowhere"):
        load_controlnet(tmp_path / "nowhere", example_pair=True)
