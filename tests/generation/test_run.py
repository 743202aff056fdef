import numpy as np
import pytest
import torch

from prompt_diffusion.data.transforms import decode_image, encode_png, resize_image
from prompt_diffusion.generation import build_request, encode_result, read_record, run_request
from prompt_diffusion.store.fingerprint import compute_digest


def run(model, files, on_step=None, pairs=1, **fields):
    request = build_request({"model": "anything", "seed": 5, **fields})
    return run_request(request, model, files["query"], [(files["source"], files["target"])] * pairs, on_step)


def read(data):
    return resize_image(decode_image(data), 32)


def test_a_request_gives_what_the_pipeline_gives(model, files):
    generation = run(model, files, prompt="a red cube", num_inference_steps=2, guidance_scale=3.0)
    expected = model.pipeline(
        "a red cube",
        (read(files["source"]), read(files["target"])),
        read(files["query"]),
        guidance_scale=3.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="uint8",
    ).images[0]
    np.testing.assert_array_equal(generation.image, expected)
    assert generation.condition_map is None


def test_an_edit_gives_what_the_pipeline_gives_and_the_map_between(model, files):
    generation = run(model, files, mode="edit", condition="hed", prompt="a red cube")
    expected = model.pipeline.edit(
        read(files["query"]),
        "a red cube",
        condition="hed",
        example_pair=(read(files["source"]), read(files["target"])),
        generator=torch.Generator().manual_seed(5),
        output_type="uint8",
    )
    np.testing.assert_array_equal(generation.image, expected.images[0])
    np.testing.assert_array_equal(generation.condition_map, expected.maps[0])


def test_the_record_makes_the_image_again(model, files):
    first = run(model, files, prompt="a red cube", scheduler="unipc")
    record = read_record(encode_result(first.image, first.record))
    assert (record.request.num_inference_steps, record.request.guidance_scale, record.request.size) == (3, 2.0, 32)
    again = run_request(record.request, model, files["query"], [(files["source"], files["target"])])
    np.testing.assert_array_equal(again.image, first.image)
    assert again.record == record


def test_the_guidance_that_is_recorded_is_the_one_that_was_used(model, files):
    """Where both texts are the same the pipeline runs without guidance, whatever the model's own weight is."""
    assert run(model, files).record.request.guidance_scale == 1.0
    assert run(model, files, prompt="a red cube").record.request.guidance_scale == 2.0


def test_the_record_names_files_by_digest_and_a_folder_without_its_path(model, files, tiny_pipeline):
    text = run(model, files).record.model_dump_json()
    for name, role in (("query", "query"), ("source", "example_1_source"), ("target", "example_1_target")):
        assert f'"{role}":"{compute_digest(files[name])}"' in text
    assert '"model":"tiny-pipeline"' in text
    assert "/" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"prompt": "a blue cube"},
        {"scheduler": "dpm"},
        {"controlnet_conditioning_scale": 0.5},
        {"pairs": 0},
    ],
)
def test_each_setting_matters(model, files, change):
    fields = {"prompt": "a red cube"}
    assert not np.array_equal(run(model, files, **fields).image, run(model, files, **fields | change).image)


def test_a_scheduler_that_was_asked_for_serves_one_request(model, files):
    own, before = model.pipeline.scheduler, run(model, files).image
    run(model, files, scheduler="unipc")
    assert model.pipeline.scheduler is own
    np.testing.assert_array_equal(run(model, files).image, before)


def test_a_size_is_kept_to(model, files):
    assert run(model, files, size=64).image.shape == (64, 64, 3)


def test_steps_are_told_over_both_halves_of_an_edit(model, files):
    told = []
    run(model, files, lambda done, total: told.append((done, total)), mode="edit", condition="depth", prompt="a cube")
    assert told == [(n, 6) for n in range(1, 7)]


def test_what_a_step_raises_ends_the_run_and_leaves_the_model_usable(model, files):
    before = run(model, files).image

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(model, files, stop, scheduler="dpm")
    np.testing.assert_array_equal(run(model, files).image, before)


def test_words_that_are_not_read_are_told(model, files):
    notes = run(model, files, prompt="a red cube " * 20).notes
    assert len(notes) == 1
    assert "is cut" in notes[0]
    assert run(model, files, prompt="a red cube").notes == ()


def test_a_damaged_image_is_named(model, files):
    with pytest.raises(ValueError, match="example 1 target: the image cannot be decoded"):
        run(model, files | {"target": files["target"][:100]})


def test_a_pair_of_another_shape_is_refused_and_another_size_of_one_shape_is_not(model, files):
    wide = encode_png(np.zeros((30, 60, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"example 1: its source has 48 x 48 pixels and its target 60 x 30, .*cut both"
    ):
        run(model, files | {"target": wide})
    twice = encode_png(decode_image(files["target"]).repeat(2, axis=0).repeat(2, axis=1))
    assert run(model, files | {"target": twice}).image.shape == (32, 32, 3)
