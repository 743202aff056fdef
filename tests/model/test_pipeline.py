import numpy as np
import pytest
import torch
from PIL import Image

from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline, load_pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    base = load_base(tiny_base)
    torch.manual_seed(3)
    controlnet = PromptDiffusionControlNet.from_unet(base.unet, (4, 8, 8)).eval()
    for parameter in controlnet.parameters():  # a fresh one would ignore pair and query
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline = PromptDiffusionPipeline.from_parts(base, controlnet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_images(count):
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for _ in range(3)]


def run(pipeline, rows, images, guidance_scale=2.0, **options):
    source, target, query = (stack[rows] for stack in images)
    return pipeline(
        ["a red cube"] * len(rows),
        (source, target),
        query,
        guidance_scale=guidance_scale,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(100 + row) for row in rows],
        output_type="uint8",
        **options,
    ).images


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(pipeline, guidance_scale):
    images = draw_images(5)
    together = run(pipeline, [0, 1, 2, 3, 4], images, guidance_scale)
    alone = np.concatenate([run(pipeline, [row], images, guidance_scale) for row in range(5)])
    # the same arithmetic in another order: at most one grey level on few pixels
    difference = np.abs(together.astype(int) - alone.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert np.abs(together[0].astype(int) - together[1]).mean() > 1


def test_pair_query_and_text_each_matter(pipeline):
    images = draw_images(2)
    first = run(pipeline, [0], images)
    for changed in range(3):
        others = [stack.copy() for stack in images]
        others[changed][0] = images[changed][1]
        assert not np.array_equal(first, run(pipeline, [0], others))


def test_the_unconditional_branch_keeps_the_pair_and_the_query(pipeline):
    """With equal texts both branches are the same, whatever the guidance weight: nothing but text may differ."""
    images = draw_images(1)
    unguided = run(pipeline, [0], images, 1.0)
    guided = run(pipeline, [0], images, 7.0, negative_prompt="a red cube")
    assert np.abs(unguided.astype(int) - guided.astype(int)).max() <= 1


def test_pil_in_pil_out(pipeline):
    image = Image.fromarray(draw_images(1)[0][0])
    result = pipeline(
        "a red cube", (image, image), image, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    )
    assert isinstance(result.images[0], Image.Image)
    assert result.images[0].size == (32, 32)


def test_a_saved_pipeline_loads_from_safetensors_and_json_alone(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".txt"}
    images = draw_images(1)
    np.testing.assert_array_equal(run(pipeline, [0], images), run(load_pipeline(tmp_path), [0], images))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": np.zeros((2, 32, 32, 3), np.int64)}, "query: images are uint8, uint16, or floats in .*, got int64"),
        ({"query": np.zeros((2, 30, 32, 3), np.uint8)}, "must be multiples of"),
        (
            {"example_pair": (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 64, 64, 3), np.uint8))},
            "must have one size",
        ),
        ({"example_pair": (np.zeros((3, 32, 32, 3), np.uint8),) * 2}, "3 example pairs were given for 2 queries"),
        ({"prompt": ["a", "b", "c"]}, "3 texts as prompt were given for 2 queries"),
        ({"generator": [torch.Generator()]}, "1 generators were given for 2 images"),
    ],
)
def test_what_does_not_fit_is_named(pipeline, change, sentence):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    arguments = {"prompt": "", "example_pair": (images, images), "query": images, "num_inference_steps": 1} | change
    with pytest.raises(ValueError, match=sentence):
        pipeline(**arguments)


def test_a_folder_that_lacks_a_part_is_named(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is no Prompt Diffusion pipeline: it has no vae"):
        load_pipeline(tmp_path)
