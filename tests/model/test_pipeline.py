"""A call: what an image depends on, what serves a batch, and what is refused."""

import logging

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from prompt_diffusion.model.text import find_cut_text


def run(pipeline, rows, images, guidance_scale=2.0, **options):
    source, target, query = (stack[rows] for stack in images)
    return pipeline(
        ["a red cube"] * len(rows),
        (source, target),
        query,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(100 + row) for row in rows],
        output_type="uint8",
        **options,
    ).images


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(pipeline, draw_images, guidance_scale):
    images = draw_images(5)
    together = run(pipeline, [0, 1, 2, 3, 4], images, guidance_scale)
    alone = np.concatenate([run(pipeline, [row], images, guidance_scale) for row in range(5)])
    # the same arithmetic in another order: at most one grey level on few pixels
    difference = np.abs(together.astype(int) - alone.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert np.abs(together[0].astype(int) - together[1]).mean() > 1


def test_pair_query_and_text_each_matter(pipeline, draw_images):
    images = draw_images(2)
    first = run(pipeline, [0], images)
    for changed in range(3):
        others = [stack.copy() for stack in images]
        others[changed][0] = images[changed][1]
        assert not np.array_equal(first, run(pipeline, [0], others))
    source, target, query = images
    generator = torch.Generator().manual_seed(100)
    other = pipeline("a clear sky", (source[0], target[0]), query[0], generator=generator, output_type="uint8").images
    assert not np.array_equal(first, other)


def test_the_unconditional_branch_keeps_the_pair_and_the_query(pipeline, draw_images):
    """With equal texts both branches are the same, whatever the guidance weight: nothing but text may differ."""
    images = draw_images(1)
    unguided = run(pipeline, [0], images, 1.0)
    guided = run(pipeline, [0], images, 7.0, negative_prompt="a red cube")
    assert np.abs(unguided.astype(int) - guided.astype(int)).max() <= 1


def test_what_a_call_does_not_say_is_the_models_own(pipeline, draw_images, seeded):
    source, target, query = draw_images(1)

    def call(prompt="a red cube", **options):
        return pipeline(
            prompt, (source, target), query, generator=seeded(1), output_type="uint8", **options
        ).images, pipeline.num_timesteps

    plain, steps = call()
    assert steps == pipeline.default_num_inference_steps == 3
    assert pipeline.guidance_scale == pipeline.default_guidance_scale == 2.0
    np.testing.assert_array_equal(plain, call(guidance_scale=2.0, num_inference_steps=3)[0])
    assert not np.array_equal(plain, call(guidance_scale=4.0)[0])
    # with no text there is nothing to guide by, and no branch is run for it; asked for, it is
    empty, _ = call(prompt="")
    assert pipeline.guidance_scale == 1.0
    np.testing.assert_array_equal(empty, call(prompt="", guidance_scale=1.0)[0])
    call(prompt="", guidance_scale=5.0)
    assert pipeline.guidance_scale == 5.0
    call(prompt="", negative_prompt="a clear sky")
    assert pipeline.guidance_scale == 2.0


def test_the_stems_run_once_an_image_and_the_branches_in_one_pass(pipeline, draw_images):
    source, target, query = draw_images(2)
    seen = {"query": [], "example": [], "unet": []}
    parts = {
        "query": pipeline.controlnet.query_stem,
        "example": pipeline.controlnet.example_stem,
        "unet": pipeline.unet.conv_in,
    }
    hooks = [
        part.register_forward_hook(lambda _, inputs, __, name=name: seen[name].append(len(inputs[0])))
        for name, part in parts.items()
    ]
    try:
        pipeline("a red cube", (source[0], target[0]), query, num_inference_steps=5, num_images_per_prompt=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {"query": [2], "example": [1], "unet": [2 * 2 * 3] * 5}


def test_one_prompt_pair_or_query_serves_a_batch(pipeline, draw_images, seeded):
    source, target, query = draw_images(3)

    def call(prompt, pair, queries, seeds=(1, 2, 3)):
        return pipeline(prompt, pair, queries, generator=seeded(*seeds), output_type="np").images

    texts = ["a red cube", "a green floor", "a clear sky"]
    for prompt, pair, queries in (
        ("a red cube", (source[0], target[0]), query),
        (texts, (source[0], target[0]), query[0]),
        ("a red cube", (source, target), query[0]),
        (texts, (list(source), list(target)), [Image.fromarray(each) for each in query]),
    ):
        alone = [
            call(
                prompt if isinstance(prompt, str) else prompt[i],
                tuple(side if np.ndim(side) == 3 else side[i] for side in pair),
                queries[i] if len(queries) == 3 else queries,
                (i + 1,),
            )[0]
            for i in range(3)
        ]
        np.testing.assert_allclose(call(prompt, pair, queries), alone, atol=1e-4)


def test_several_images_a_prompt_stand_side_by_side_and_each_has_its_seed(pipeline, draw_images, seeded):
    source, target, query = draw_images(2)
    prompts = ["a red cube", "a clear sky"]
    four = pipeline(
        prompts, (source, target), query, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), output_type="np"
    ).images
    for i in range(2):
        for j in range(2):
            pair, seed = (source[i], target[i]), seeded(1 + 2 * i + j)
            one = pipeline(prompts[i], pair, query[i], generator=seed, output_type="np").images
            np.testing.assert_allclose(four[2 * i + j], one[0], atol=1e-4)


def test_one_pair_in_a_list_is_the_plain_model_and_k_have_no_order(pipeline, draw_images, seeded):
    pairs = [tuple(draw_images(2, seed)[:2]) for seed in range(4)]
    query = draw_images(2)[2]

    def call(example_pair):
        return pipeline("a red cube", example_pair, query, generator=seeded(1, 2), output_type="latent").images

    plain = call(pairs[0])
    assert torch.equal(call([pairs[0]]), plain)
    several = call(pairs)
    assert not torch.equal(several, plain)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]):
        assert torch.equal(call([pairs[i] for i in order]), several)
    torch.testing.assert_close(call([pairs[0]] * 3), plain, rtol=1e-4, atol=1e-4)
    # one shared by the batch, one each
    shared = (pairs[1][0][0], pairs[1][1][0])
    each = tuple(np.stack([side, side]) for side in shared)
    torch.testing.assert_close(call([pairs[0], shared]), call([pairs[0], each]), rtol=1e-4, atol=1e-4)


def test_k_pairs_are_averaged_after_the_example_stem(pipeline, draw_images):
    pairs = [torch.rand(2, 6, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(3)]
    query = torch.rand(2, 3, 32, 32) * 2 - 1
    controlnet = pipeline.controlnet
    with torch.no_grad():
        expected = controlnet.query_stem(query) + sum(controlnet.example_stem(pair) for pair in pairs) / 3
        found = controlnet.compute_condition_features(pairs, query)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_without_an_example_stem_refuses_pairs(baseline, draw_images):
    source, target, query = draw_images(1)
    assert baseline("a red cube", None, query, output_type="uint8").images.shape == (1, 32, 32, 3)
    for pairs in ((source, target), [(source, target)] * 2):
        with pytest.raises(ValueError, match="this model has no example stem"):
            baseline("a red cube", pairs, query)


def test_output_types_show_the_same_images(pipeline, draw_images, seeded):
    source, target, query = draw_images(2)
    shown = {
        kind: pipeline("a red cube", (source, target), query, generator=seeded(1, 2), output_type=kind).images
        for kind in ("pil", "np", "pt", "uint8", "latent")
    }
    assert [image.size for image in shown["pil"]] == [(32, 32)] * 2
    np.testing.assert_array_equal(np.stack(shown["pil"]), shown["uint8"])
    np.testing.assert_array_equal((shown["np"] * 255).round().astype(np.uint8), shown["uint8"])
    np.testing.assert_array_equal(shown["pt"].permute(0, 2, 3, 1), shown["np"])
    assert shown["latent"].shape == (2, 4, 8, 8)
    (images,) = pipeline(
        "a red cube", (source, target), query, generator=seeded(1, 2), output_type="uint8", return_dict=False
    )
    np.testing.assert_array_equal(images, shown["uint8"])


def test_a_callback_sees_changes_and_interrupts_the_steps(pipeline, draw_images, seeded):
    source, target, query = draw_images(1)
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors), pipe.num_timesteps))
        return tensors

    def call(callback, **options):
        arguments = ("a red cube", (source, target), query)
        return pipeline(
            *arguments,
            generator=seeded(1),
            num_inference_steps=4,
            output_type="latent",
            callback_on_step_end=callback,
            **options,
        ).images

    plain = call(None)
    assert torch.equal(call(watch, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]), plain)
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, *_ in seen] == pipeline.scheduler.timesteps.tolist()
    assert {(tuple(names), number) for *_, names, number in seen} == {(("latents", "prompt_embeds"), 4)}
    assert float(call(lambda pipe, i, t, tensors: {"latents": tensors["latents"] * 0}).abs().max()) == 0.0

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    steps = []
    halfway = call(stop)
    assert steps == [0, 1]
    assert not torch.equal(halfway, plain)
    assert torch.equal(call(None), plain)  # the next call goes to its end
    # one of diffusers' own: no guidance after the first half
    cut = call(SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    assert not torch.equal(cut, plain)
    with pytest.raises(ValueError, match="may name latents, prompt_embeds, got noise"):
        call(watch, callback_on_step_end_tensor_inputs=["noise"])


def test_the_progress_bar_counts_steps(pipeline, draw_images, capsys):
    source, target, query = draw_images(1)
    pipeline.set_progress_bar_config(desc="generating", ascii=True)
    try:
        pipeline("a red cube", (source, target), query, num_inference_steps=4)
    finally:
        pipeline.set_progress_bar_config(disable=True)
    assert "generating: 100%" in (written := capsys.readouterr().err)
    assert "4/4" in written


def test_exactly_what_of_a_prompt_is_cut_is_logged(pipeline, draw_images, caplog):
    source, target, query = draw_images(1)
    words = "A red cube on a green floor under a clear sky, "
    long = words * 3 + "and THE END"
    cut = find_cut_text(pipeline.tokenizer, long)
    assert long.endswith(cut)
    assert cut.endswith("THE END")
    assert find_cut_text(pipeline.tokenizer, long.removesuffix(cut)) == ""
    kept, whole = (
        pipeline.tokenizer(text, truncation=True, max_length=pipeline.tokenizer.model_max_length).input_ids
        for text in (long.removesuffix(cut), long)
    )
    assert kept == whole
    with caplog.at_level(logging.WARNING):
        pipeline([long, "a red cube"], (source, target), query, negative_prompt="", num_inference_steps=1)
    (record,) = caplog.records
    assert record.getMessage() == f"prompt is cut: the text encoder reads 24 tokens, and {cut!r} is not read"


def black(count, size=32):
    return np.zeros((count, size, size, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": []}, "query: there is no image in the list"),
        ({"height": 30, "width": 30}, "must be multiples of 4, got 30 x 30: give height=32, width=32"),
        ({"height": 33}, "must be multiples of 4, got 33 x 32: give height=32, width=32"),
        (
            {"example_pair": (black(1), black(1, 64))},
            r"source and target must have one size, got 32 x 32 and 64 x 64 \(height x width\)",
        ),
        ({"example_pair": (black(1), black(2))}, "as many sources as targets, got 1 and 2"),
        ({"example_pair": (black(3), black(3))}, "3 example pairs were given for 2 queries: give one, or one each"),
        ({"example_pair": []}, "there is no example pair in the list"),
        ({"example_pair": [black(1)]}, r"example_pair is \(source, target\), a list of such pairs, or None"),
        ({"prompt": ["a", "b", "c"]}, "3 texts as prompt were given for 2 queries: give one, or one each"),
        ({"prompt": 7}, "prompt is a text or a list of texts, got int"),
        ({"prompt": [7, "a"]}, "prompt is a text or a list of texts, got int"),
        ({"generator": [torch.Generator()]}, "1 generators were given for 2 images: give one each"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and 1000, got 0"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg': choose one of pil, np, pt, uint8, latent"),
    ],
)
def test_what_does_not_fit_is_named(pipeline, change, sentence):
    images = black(2)
    arguments = {"prompt": "", "example_pair": (images, images), "query": images, "num_inference_steps": 1} | change
    with pytest.raises(ValueError, match=sentence) as caught:
        pipeline(**arguments)
    assert "\n" not in str(caught.value)
