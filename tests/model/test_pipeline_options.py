"""What users of diffusers switch on: less memory, other precisions and layouts, compiled networks; the same images."""

import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from prompt_diffusion.model.load import load_pipeline


@pytest.fixture(scope="module")
def generate(draw_images, seeded):
    source, target, query = draw_images(2)

    def call(pipeline, **options):
        options = {"output_type": "uint8"} | options
        pair = (source, target)
        return pipeline("a red cube", pair, query, generator=seeded(1, 2), num_inference_steps=2, **options).images

    return call


def difference(left, right):
    return np.abs(left.astype(int) - right.astype(int))


def test_the_whole_model_comes_to_the_device_part_by_part(pipeline, fresh, generate):
    """Offloaded to the same CPU, for want of an accelerator: every part is fetched before it computes, the stems too."""
    fresh.enable_model_cpu_offload(device="cpu")
    assert fresh._execution_device == torch.device("cpu", 0)
    fetched = []
    for name in ("text_encoder", "controlnet", "unet", "vae"):
        hook = getattr(fresh, name)._hf_hook

        def pre_forward(module, *args, own=hook.pre_forward, name=name, **kwargs):
            fetched.append(name)
            return own(module, *args, **kwargs)

        hook.pre_forward = pre_forward
    fresh.controlnet.query_stem.register_forward_hook(lambda *_: fetched.append("stem"))
    hooks = list(fresh._all_hooks)
    np.testing.assert_array_equal(generate(fresh), generate(pipeline))
    steps = ["controlnet", "unet"] * 2
    assert fetched == ["text_encoder", "text_encoder", "controlnet", "stem", *steps, "vae"]
    # given back, and set up anew for the next call, after an error too
    assert fresh._all_hooks
    assert not set(map(id, hooks)) & set(map(id, fresh._all_hooks))
    hooks = list(fresh._all_hooks)
    with pytest.raises(ZeroDivisionError):
        generate(fresh, callback_on_step_end=lambda *_: 1 / 0)
    assert not set(map(id, hooks)) & set(map(id, fresh._all_hooks))
    np.testing.assert_array_equal(generate(fresh), generate(pipeline))


def test_slicing_changes_memory_and_no_image(pipeline, fresh, generate):
    fresh.enable_attention_slicing()
    fresh.enable_vae_slicing()
    assert fresh.vae.use_slicing
    processors = {type(each).__name__ for each in fresh.controlnet.trunk.attn_processors.values()}
    assert processors == {"SlicedAttnProcessor"}
    assert difference(generate(fresh), generate(pipeline)).max() <= 1
    fresh.disable_attention_slicing()
    fresh.disable_vae_slicing()
    assert not fresh.vae.use_slicing
    np.testing.assert_array_equal(generate(fresh), generate(pipeline))


def test_tiling_is_the_autoencoders(fresh, generate):
    fresh.enable_vae_tiling()
    assert fresh.vae.use_tiling
    seen = []
    fresh.vae.decoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    assert generate(fresh, height=64, width=64).shape == (2, 64, 64, 3)
    assert isinstance(fresh.vae, AutoencoderKL)
    assert len(seen) > 1
    fresh.disable_vae_tiling()
    assert not fresh.vae.use_tiling


def test_channels_last_is_the_same_to_rounding(pipeline, fresh, generate):
    for part in (fresh.unet, fresh.controlnet, fresh.vae):
        part.to(memory_format=torch.channels_last)
    assert difference(generate(fresh), generate(pipeline)).max() <= 1


def test_compiled_networks_make_the_same_images_and_are_saved_plain(pipeline, fresh, generate, tmp_path):
    # traced whole and run by torch itself: no C++ compiler is needed here
    fresh.unet = torch.compile(fresh.unet, backend="eager")
    fresh.controlnet = torch.compile(fresh.controlnet, backend="eager")
    np.testing.assert_array_equal(generate(fresh, guidance_scale=1.0), generate(pipeline, guidance_scale=1.0))
    fresh.save_pretrained(tmp_path)
    np.testing.assert_array_equal(generate(load_pipeline(tmp_path)), generate(pipeline))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_stays_half(pipeline, folder, generate, dtype, caplog):
    with caplog.at_level(logging.ERROR):  # diffusers warns of float16 on a CPU
        half = load_pipeline(folder, dtype=dtype)
    parts = (half.unet, half.controlnet, half.vae, half.text_encoder)
    assert {part.dtype for part in parts} == {dtype}
    assert generate(half, output_type="latent").dtype == dtype
    assert difference(generate(half), generate(pipeline)).mean() < 6
    assert generate(half, output_type="np").dtype == np.float32


def test_what_is_not_finite_is_no_picture(fresh, generate):
    with torch.no_grad():
        fresh.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="the pictures have values that are not finite, in float32"):
        generate(fresh)
