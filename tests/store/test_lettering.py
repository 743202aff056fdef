"""Text in pictures shows every letter: in some font, or by its name or code, never as a box."""

import io

import numpy as np
import pytest
from PIL import Image

from prompt_diffusion.store.contact_sheet import draw_contact_sheet
from prompt_diffusion.store.lettering import Lettering


@pytest.mark.parametrize("text", ["a cat, émigré", "кошка", "γάτα", "∑ ☕ ✓", "tab\tand space"])
def test_what_the_shipped_fonts_have_stays(text: str) -> None:
    assert Lettering(13, ()).spell(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("猫の絵", "[U+732B U+306E U+7D75]"),
        ("a 고양이 b", "a [U+ACE0 U+C591 U+C774] b"),
        ("go \U0001f680!", "go [rocket]!"),
        ("\U0001f469\u200d\U0001f680", "[woman rocket]"),
    ],
)
def test_what_no_font_has_is_told_by_name_or_code(text: str, expected: str) -> None:
    assert Lettering(13, ()).spell(text) == expected


def test_no_letter_is_drawn_as_the_box_of_a_missing_one() -> None:
    def draw(caption: str) -> bytes:
        sheet = draw_contact_sheet("t", ["x"], [{}], [["id", caption]])
        return np.asarray(Image.open(io.BytesIO(sheet)).convert("L")).tobytes()

    captions = ["two words 猫", "two words 犬", "two words \U0001f680"]
    assert len({draw(caption) for caption in captions}) == 3


def test_a_text_is_as_wide_as_its_parts() -> None:
    lettering = Lettering(13, ())
    assert lettering.measure("cat кошка") == pytest.approx(lettering.measure("cat ") + lettering.measure("кошка"))
    assert lettering.measure("") == 0
