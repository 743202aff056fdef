import numpy as np
import pytest

from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.photos import EDITS, PHOTOGRAPHS, PhotosConfig, PhotosSource
from prompt_diffusion.data.transforms import decode_image


@pytest.fixture(scope="module")
def pairs() -> list[ImagePair]:
    source = PhotosSource(PhotosConfig(crops_per_photo=2), 48)
    read = list(source.read(source.plan()))
    assert all(isinstance(pair, ImagePair) for pair in read)
    return [pair for pair in read if isinstance(pair, ImagePair)]


def test_every_photograph_is_a_prompt_group_with_its_crops(pairs: list[ImagePair]) -> None:
    assert [pair.group_id for pair in pairs] == [photo.name for photo in PHOTOGRAPHS for _ in range(2)]
    assert [pair.seed for pair in pairs] == [0, 1] * len(PHOTOGRAPHS)
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert first.edit_instruction == second.edit_instruction
        assert first.edited_prompt == second.edited_prompt
        assert first.input_image != second.input_image


def test_the_instruction_says_how_the_twin_was_made(pairs: list[ImagePair]) -> None:
    for pair in pairs:
        words, edit = EDITS[pair.edit_instruction]
        assert pair.edited_prompt == f"{pair.input_prompt} {words}"
        assert np.array_equal(edit(decode_image(pair.input_image)), decode_image(pair.edited_image))
    assert {pair.edit_instruction for pair in pairs} == set(EDITS)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("make it brighter", [[150, 0, 255], [15, 30, 45]]),
        ("make it darker", [[50, 0, 100], [5, 10, 15]]),
        ("make it warmer", [[125, 0, 130], [13, 20, 20]]),
        ("make it cooler", [[70, 0, 255], [7, 19, 39]]),
        ("make it black and white", [[53, 53, 53], [18, 18, 18]]),
        ("raise the contrast", [[83, 0, 243], [0, 0, 0]]),
        ("mirror it", [[10, 20, 30], [100, 0, 200]]),
    ],
)
def test_edits_compute_what_they_promise(instruction: str, expected: list[list[int]]) -> None:
    image = np.array([[[100, 0, 200], [10, 20, 30]]], dtype=np.uint8)
    assert EDITS[instruction][1](image).tolist() == [expected]


def test_another_seed_cuts_other_crops() -> None:
    images = []
    for seed in (0, 1):
        source = PhotosSource(PhotosConfig(crops_per_photo=1, seed=seed), 32)
        (pair,) = source.read(source.plan()[:1])
        assert isinstance(pair, ImagePair)
        images.append(pair.input_image)
    assert images[0] != images[1]
