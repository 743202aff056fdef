"""Text in pictures: each letter in the first font that has it, and where none has, its name or code instead of a box."""

import unicodedata
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_NO_LETTER = "\U0010fffe"  # never a character: a font draws its box for it
_JOINERS = "\u200d\ufe0e\ufe0f"  # they choose and join emoji, and are drawn as nothing


class Lettering:
    """Fonts of one size: Pillow's own, DejaVu Sans of matplotlib, then whatever is installed on the machine."""

    def __init__(self, size: int, font_files: tuple[str, ...] | None = None) -> None:
        """Take the fonts to look in after the first two; None finds those of the machine when a letter needs them."""
        self.size, self._font_files = size, font_files

    def spell(self, text: str) -> str:
        """Return the text with the letters that no font has as `[grinning face]` or `[U+4E2D U+6587]`."""
        words: list[str] = []
        codes: list[str] = []
        for letter in [*text, ""]:
            if letter in _JOINERS and letter:
                continue
            if letter and self._find_font(letter) is None:
                name = unicodedata.name(letter, "") if unicodedata.category(letter) == "So" else ""
                codes.append(name.lower() or f"U+{ord(letter):04X}")
                continue
            if codes:
                words.append(f"[{' '.join(codes)}]")
                codes = []
            words.append(letter)
        return "".join(words)

    def measure(self, text: str) -> float:
        """Return the width of a spelled text in pixels."""
        return sum(float(font.getlength(part)) for font, part in self._split(text))

    def write(
        self, draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, ink: tuple[int, int, int]
    ) -> None:
        """Draw a spelled text from its left upper corner."""
        left, top = corner
        for font, part in self._split(text):
            draw.text((left, top), part, fill=ink, font=font)
            left += float(font.getlength(part))

    def _split(self, text: str) -> list[tuple[Font, str]]:
        """Return the parts of a text that one font draws."""
        parts: list[tuple[Font, str]] = []
        for letter in text:
            font = self._find_font(letter) or _load_first(self.size)
            if parts and parts[-1][0] is font:
                parts[-1] = (font, parts[-1][1] + letter)
            else:
                parts.append((font, letter))
        return parts

    def _find_font(self, letter: str) -> Font | None:
        if letter.isascii() or letter.isspace():
            return _load_first(self.size)
        return _find_font(letter, self.size, self._font_files)


@cache
def _load_first(size: int) -> Font:
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=1 << 12)
def _find_font(letter: str, size: int, font_files: tuple[str, ...] | None) -> Font | None:
    """Return the first font that has a letter, None where none has."""
    fonts = [_load_first(size)]
    if not _has_letter(fonts[0], letter):
        shipped = _locate_dejavu()
        fonts = [font for file in shipped if (font := _load(file, size)) is not None]
        if not any(_has_letter(font, letter) for font in fonts):
            files = _find_system_fonts() if font_files is None else font_files
            fonts = [font for file in files if (font := _load(file, size)) is not None]
    return next((font for font in fonts if _has_letter(font, letter)), None)


def _has_letter(font: Font, letter: str) -> bool:
    """Say whether a font has a letter: else it draws what it draws for no letter at all."""
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))


@lru_cache(maxsize=512)
def _load(file: str, size: int) -> Font | None:
    """Return a font; None for one of pictures in other sizes, as coloured emoji are, or of a format that is not read."""
    try:
        return ImageFont.truetype(file, size)
    except OSError:
        return None


def _locate_dejavu() -> list[str]:
    """Return the file of the font that matplotlib ships, found without importing it, which would cost a second."""
    spec = find_spec("matplotlib")
    places = (spec.submodule_search_locations or []) if spec is not None else []
    return [str(Path(place, "mpl-data/fonts/ttf/DejaVuSans.ttf")) for place in places]


@cache
def _find_system_fonts() -> tuple[str, ...]:
    from matplotlib.font_manager import findSystemFonts

    return tuple(sorted(findSystemFonts()))
