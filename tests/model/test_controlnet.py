import pytest
import torch

from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet, predict_noise, trained_unet_parameters

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
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(unet, load_weights_from_unet=False).config
