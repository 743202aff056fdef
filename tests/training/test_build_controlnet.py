"""What a recipe's ControlNet starts from."""

import pytest
import torch
from diffusers import ControlNetModel

from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.training.train import build_controlnet


@pytest.fixture
def base(tiny_base):
    return load_base(tiny_base)


@pytest.fixture
def public(base, tmp_path):
    """A folder of a diffusers ControlNet with random weights."""
    torch.manual_seed(1)
    source = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8, 8))
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    source.save_pretrained(tmp_path / "public")
    return str(tmp_path / "public"), source.state_dict()


@pytest.mark.parametrize("method", ["prompt_diffusion", "controlnet"])
def test_a_public_controlnet_gives_trunk_and_query_stem_and_the_rest_is_the_seeds(base, public, tiny_config, method):
    folder, weights = public
    config = tiny_config.model_copy(
        update={"controlnet": folder, "method": method, "vision_tasks": ("depth_to_image",), "seed": 3}
    )
    controlnet, again = build_controlnet(config, base), build_controlnet(config, base)
    state = controlnet.state_dict()
    for name, value in weights.items():
        stem = "controlnet_cond_embedding."
        ours = f"query_stem.{name.removeprefix(stem)}" if name.startswith(stem) else f"trunk.{name}"
        assert torch.equal(state[ours], value)
    assert controlnet.uses_example_pair == (method == "prompt_diffusion")
    if controlnet.uses_example_pair:
        assert not controlnet.example_stem.conv_out.weight.any()  # silent at first
        other = build_controlnet(config.model_copy(update={"seed": 4}), base)
        assert torch.equal(again.example_stem.conv_in.weight, controlnet.example_stem.conv_in.weight)
        assert not torch.equal(other.example_stem.conv_in.weight, controlnet.example_stem.conv_in.weight)


def test_a_trained_pipeline_is_gone_on_with(base, tiny_config, tmp_path):
    trained = build_controlnet(tiny_config, base)
    with torch.no_grad():
        for parameter in [*trained.parameters(), *base.unet.parameters()]:
            parameter += 0.01
    PromptDiffusionPipeline.from_parts(base, trained).save_pretrained(tmp_path)
    config = tiny_config.model_copy(update={"base": str(tmp_path), "controlnet": "base"})
    start = load_base(config.base)
    for one, other in ((start.unet, base.unet), (build_controlnet(config, start), trained)):
        assert all(torch.equal(one.state_dict()[name], value) for name, value in other.state_dict().items())


def test_one_that_does_not_fit_is_refused_with_both_values(base, public, tiny_config):
    config = tiny_config.model_copy(update={"controlnet": public[0], "stem_channels": (4, 8, 16)})
    with pytest.raises(ValueError, match=r"stem channels \(4, 8, 8\), but the recipe's stem_channels are \(4, 8, 16\)"):
        build_controlnet(config, base)
    demo = load_base("demo-base")
    with pytest.raises(ValueError, match=r"has block_out_channels \(16, 16\), but the base's UNet has"):
        build_controlnet(tiny_config.model_copy(update={"controlnet": public[0]}), demo)
