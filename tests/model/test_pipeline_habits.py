"""What users of diffusers bring along: its arguments by its names, its mixins, and a sentence for each mistake."""

import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import prompt_diffusion
from prompt_diffusion.model.load import load_pipeline
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline


@pytest.fixture(scope="module")
def generate(draw_images, seeded):
    source, target, query = draw_images(1)

    def call(pipeline, prompt="a red cube", **options):
        options = {"query": query, "generator": seeded(1), "output_type": "latent"} | options
        return pipeline(prompt, (source, target), **options).images

    return call


@pytest.mark.parametrize("options", [{}, {"negative_prompt": "a clear sky"}, {"guidance_scale": 1.0}, {"clip_skip": 1}])
def test_embeddings_stand_in_place_of_their_texts(pipeline, generate, options):
    plain = generate(pipeline, **options)
    encoded = {name: value for name, value in options.items() if name != "guidance_scale"}
    prompts, negatives = pipeline.encode_prompt("a red cube", **encoded)
    embeds = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives}
    rest = {name: value for name, value in options.items() if name == "guidance_scale"}
    assert torch.equal(generate(pipeline, None, **embeds, **rest), plain)
    assert torch.equal(generate(pipeline, None, **options, prompt_embeds=prompts), plain)


def test_embeddings_are_a_batch_as_texts_are(pipeline, draw_images, seeded):
    source, target, query = draw_images(1)
    texts = ["a red cube", "a clear sky"]
    prompts, negatives = pipeline.encode_prompt(texts, negative_prompt="a green floor")
    assert prompts.shape == negatives.shape == (2, 24, 16)
    options = {"example_pair": (source, target), "query": query, "num_images_per_prompt": 2, "output_type": "latent"}
    plain = pipeline(texts, negative_prompt="a green floor", generator=seeded(1, 2, 3, 4), **options).images
    given = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives[:1]}
    assert torch.equal(pipeline(**given, generator=seeded(1, 2, 3, 4), **options).images, plain)
    twice, _ = pipeline.encode_prompt(texts, num_images_per_prompt=2)
    assert torch.equal(twice, prompts.repeat_interleave(2, dim=0))
    assert pipeline.encode_prompt("a red cube", do_classifier_free_guidance=False)[1] is None


def test_clip_skip_leaves_out_the_text_encoders_last_layers(pipeline, generate):
    plain = generate(pipeline)
    assert torch.equal(generate(pipeline, clip_skip=0), plain)
    assert not torch.equal(generate(pipeline, clip_skip=1), plain)


def test_given_latents_are_the_noise_that_is_started_from(pipeline, generate, seeded):
    noise = torch.randn(1, 4, 8, 8, generator=seeded(1)[0])
    assert torch.equal(generate(pipeline, latents=noise, generator=None), generate(pipeline))
    assert not torch.equal(generate(pipeline, latents=-noise, generator=None), generate(pipeline))


def test_guidance_rescale_is_the_papers_and_none_at_zero(pipeline, generate):
    plain, rescaled = (
        generate(pipeline, guidance_scale=7.5),
        generate(pipeline, guidance_scale=7.5, guidance_rescale=0.7),
    )
    assert torch.equal(generate(pipeline, guidance_scale=7.5, guidance_rescale=0.0), plain)
    assert not torch.equal(rescaled, plain)
    assert torch.equal(  # where there is no guidance there is nothing to rescale
        generate(pipeline, guidance_scale=1.0, guidance_rescale=0.7), generate(pipeline, guidance_scale=1.0)
    )


def test_the_controlnet_takes_part_in_the_steps_that_are_asked_for(pipeline, generate):
    scales = []
    hook = pipeline.controlnet.register_forward_pre_hook(lambda _, inputs: scales.append(inputs[4]))
    try:
        generate(pipeline, num_inference_steps=4)
        assert scales == [1.0] * 4
        scales.clear()
        generate(
            pipeline,
            num_inference_steps=4,
            controlnet_conditioning_scale=0.5,
            control_guidance_start=0.25,
            control_guidance_end=0.75,
        )
        assert scales == [0.0, 0.5, 0.5, 0.0]
    finally:
        hook.remove()


def test_image_is_the_query_by_diffusers_name(pipeline, generate, draw_images):
    query = draw_images(1)[2]
    assert torch.equal(generate(pipeline, query=None, image=query), generate(pipeline))


def test_images_may_be_paths(pipeline, draw_images, seeded, tmp_path):
    pictures = [stack[0] for stack in draw_images(1)]
    paths = [tmp_path / f"{name}.png" for name in ("source", "target", "query")]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)

    def call(source, target, query):
        return pipeline("a red cube", (source, target), query, generator=seeded(1), output_type="uint8").images

    np.testing.assert_array_equal(call(*paths), call(*pictures))
    np.testing.assert_array_equal(call(*map(str, paths)), call(*pictures))
    np.testing.assert_array_equal(call([paths[0]], [paths[1]], [str(paths[2])]), call(*pictures))


def test_the_default_size_is_what_the_model_was_trained_at(pipeline, tiny_base, draw_images):
    source, target, query = draw_images(1)
    large = [np.kron(stack[0], np.ones((3, 2, 1), np.uint8)) for stack in (source, target, query)]  # 96 x 64
    assert pipeline("", tuple(large[:2]), large[2])[0][0].size == (32, 32)
    assert pipeline("", tuple(large[:2]), large[2], height=48)[0][0].size == (32, 48)
    small = PromptDiffusionPipeline(**pipeline.components, default_image_size=16)
    small.set_progress_bar_config(disable=True)
    assert small("", tuple(large[:2]), large[2])[0][0].size == (16, 16)
    assert {each.size for each in small("", None, [query[0], large[2]])[0]} == {(16, 16)}
    PromptDiffusionPipeline(**pipeline.components, default_image_size=32)


def test_the_parts_alone_make_a_pipeline_with_the_models_own_defaults(fresh):
    again = PromptDiffusionPipeline(**fresh.components)
    assert (again.default_num_inference_steps, again.default_guidance_scale) == (3, 2.0)
    assert again.image_size == fresh.image_size
    assert dict(again.config) == dict(fresh.config)
    other = PromptDiffusionPipeline(**fresh.components, default_guidance_scale=4.0)
    assert (other.default_num_inference_steps, other.default_guidance_scale) == (3, 4.0)
    assert fresh.default_guidance_scale == 2.0
    from_diffusers = PromptDiffusionPipeline(**fresh.components, **fresh.parameters)
    assert from_diffusers.default_guidance_scale == 2.0


def test_lora_weights_are_loaded_weighted_and_unloaded(fresh, generate, tmp_path):
    plain = generate(fresh)
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        fresh.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
        layers = {
            key.replace(f".{name}.", "."): value
            for key, value in fresh.unet.state_dict().items()
            if f".{name}." in key and "lora" in key
        }
        fresh.unet.delete_adapters(name)
        fresh.save_lora_weights(tmp_path / name, unet_lora_layers=layers)
    assert torch.equal(generate(fresh), plain)
    fresh.load_lora_weights(tmp_path / "first", adapter_name="first")
    first = generate(fresh)
    assert not torch.equal(first, plain)
    fresh.load_lora_weights(tmp_path / "second", adapter_name="second")
    fresh.set_adapters(["first", "second"], adapter_weights=[1.0, 0.5])
    assert fresh.get_active_adapters() == ["first", "second"]
    assert not torch.equal(generate(fresh), first)
    fresh.set_adapters("first")
    assert torch.equal(generate(fresh), first)
    fresh.unload_lora_weights()
    assert torch.equal(generate(fresh), plain)


@pytest.mark.parametrize("vectors", [1, 2])
def test_a_textual_inversion_is_a_word_of_the_prompt(fresh, generate, vectors):
    plain, unknown = generate(fresh), generate(fresh, "a <thing>")
    embedding = torch.randn(vectors, 16, generator=torch.Generator().manual_seed(1))
    fresh.load_textual_inversion({"<thing>": embedding}, token="<thing>")
    known = generate(fresh, "a <thing>")
    assert not torch.equal(known, unknown)
    prompts, _ = fresh.encode_prompt("a <thing>")
    assert torch.equal(generate(fresh, None, prompt_embeds=prompts), known)
    fresh.unload_textual_inversion("<thing>")
    assert torch.equal(generate(fresh), plain)


def test_what_diffusers_switches_in_the_unet_is_switched_back(fresh, generate):
    plain = generate(fresh)
    fresh.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.equal(generate(fresh), plain)
    fresh.disable_freeu()
    assert torch.equal(generate(fresh), plain)


def test_a_folder_may_be_a_path_or_its_name(folder, generate):
    plain = generate(load_pipeline(folder))
    for reference in (folder, str(folder)):
        assert torch.equal(generate(load_pipeline(reference)), plain)
        assert torch.equal(generate(prompt_diffusion.load(reference)), plain)


@pytest.mark.parametrize("name", ["float16", "torch.bfloat16", torch.float16])
def test_a_precision_may_be_named_and_holds_for_every_part(folder, name):
    half = load_pipeline(folder, dtype=name)
    wanted = name if isinstance(name, torch.dtype) else getattr(torch, name.removeprefix("torch."))
    assert {part.dtype for part in (half.unet, half.controlnet, half.vae, half.text_encoder)} == {wanted}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"dtype": "float8"},
            "dtype is one of float32, float16, bfloat16, float64, as a type of torch or its name, got",
        ),
        ({"dtype": torch.int8}, "dtype is one of .*, got torch.int8"),
        ({"dtype": 16}, "dtype is one of .*, got 16"),
        ({"device": "gpu"}, "device 'gpu' cannot be used on this machine: use 'cpu' or 'auto'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used on this machine: use 'cpu' or 'auto'"),
    ],
)
def test_what_a_model_cannot_be_loaded_as_is_one_sentence(folder, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_pipeline(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_there_is_not_is_one_sentence(folder):
    with pytest.raises(ValueError, match="device 'cuda' cannot be used on this machine: use 'cpu' or 'auto'"):
        load_pipeline(folder, device="cuda")


def test_the_pair_is_checked_before_the_size(pipeline, draw_images):
    source, _, query = draw_images(1)
    with pytest.raises(ValueError, match="example source and target must have one size"):
        pipeline("", (source, np.zeros((1, 64, 64, 3), np.uint8)), query, height=33)


NAN, EMBEDS = float("nan"), torch.zeros(1, 24, 16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_inference_steps": 2.0}, "num_inference_steps must be a whole number between 1 and 1000, got 2.0"),
        ({"num_inference_steps": "2"}, "num_inference_steps must be a whole number between 1 and 1000, got '2'"),
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number between 1 and 1000, got True"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number at least 1, got 1.5"),
        ({"height": 32.0}, "height must be a whole number at least 1, got 32.0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"clip_skip": 1.0}, "clip_skip must be a whole number between 0 and 1, got 1.0"),
        ({"clip_skip": 2}, "clip_skip must be a whole number between 0 and 1, got 2"),
        ({"controlnet_conditioning_scale": [1.0]}, r"controlnet_conditioning_scale must be one number, got \[1.0\]"),
        ({"controlnet_conditioning_scale": NAN}, "controlnet_conditioning_scale must be a finite number, got nan"),
        ({"guidance_scale": NAN}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf"),
        ({"guidance_scale": "7.5"}, "guidance_scale must be one number, got '7.5'"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be between 0 and 1, got 1.5"),
        ({"eta": NAN}, "eta must be a finite number between 0 and 1, got nan"),
        ({"control_guidance_start": [0.0]}, r"control_guidance_start must be one number between 0 and 1, got \[0.0\]"),
        ({"control_guidance_end": 1.1}, "control_guidance_end must be between 0 and 1, got 1.1"),
        (
            {"control_guidance_start": 0.5, "control_guidance_end": 0.5},
            "control_guidance_start must be below control_guidance_end, got 0.5 and 0.5",
        ),
        ({"generator": 7}, "generator is a torch.Generator or a list of them, got 7: for a seed give torch.Generator"),
        ({"generator": [7]}, r"generator is a torch.Generator or a list of them, got \[7\]"),
        ({"prompt": None}, "give a prompt .* or prompt_embeds"),
        ({"prompt_embeds": EMBEDS}, "prompt and prompt_embeds are two forms of one text: give one of them"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": EMBEDS},
            "negative_prompt and negative_prompt_embeds are two forms of one text: give one of them",
        ),
        ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"prompt_embeds is a tensor N, L, 16: .*; got \(24, 16\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS[..., :8]}, r"prompt_embeds is a tensor .*; got \(1, 24, 8\)"),
        ({"prompt": None, "prompt_embeds": [0.0]}, "prompt_embeds is a tensor N, L, 16: .*; got list"),
        ({"prompt": None, "prompt_embeds": EMBEDS * NAN}, "prompt_embeds has values that are not finite"),
        (
            {"prompt": None, "prompt_embeds": EMBEDS[:, :20], "guidance_scale": 2.0},
            "prompt and negative prompt must have embeddings of one length, got 20 and 24 tokens",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDS.repeat(3, 1, 1)},
            "3 texts as prompt were given for 2 queries: give one, or one each",
        ),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents is a tensor \(2, 4, 8, 8\): .*; got \(1, 4, 8, 8\)"),
        ({"latents": np.zeros((2, 4, 8, 8))}, r"latents is a tensor \(2, 4, 8, 8\): .*; got ndarray"),
        ({"latents": torch.full((2, 4, 8, 8), NAN)}, "latents has values that are not finite"),
        ({"image": np.zeros((1, 32, 32, 3), np.uint8)}, "query and image are two names of one argument"),
        ({"query": None}, "give query, the images to transform"),
        ({"query": "none.png"}, "query: there is no image file none.png"),
        ({"query": "/"}, "query: / is a folder, not an image file"),
        ({"query": sys.executable}, "query: .*python.*: the image cannot be decoded"),
        ({"query": {}}, "query: an image is PIL, a path, an array, a tensor, or a list of them, got dict"),
        ({"example_pair": "a.png"}, r"example_pair is \(source, target\), a list of such pairs, or None"),
        ({"example_pair": 7}, r"example_pair is \(source, target\), a list of such pairs, or None"),
        ({"example_pair": ("none.png", "none.png")}, "example source: there is no image file none.png"),
        ({"callback_on_step_end": 7}, "callback_on_step_end is called after each step, got 7"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "tensor_inputs is a list of names, got 'latents'"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(pipeline, change, sentence):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    arguments = {"prompt": "", "example_pair": (images, images), "query": images, "num_inference_steps": 1} | change
    with pytest.raises(ValueError, match=sentence) as caught:
        pipeline(**arguments)
    assert "\n" not in str(caught.value)
