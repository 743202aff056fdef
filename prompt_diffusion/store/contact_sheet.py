"""Draws a contact sheet: small images in a grid, with names above the columns and texts beside the rows."""

import io

from PIL import Image, ImageDraw

from prompt_diffusion.image_files import MAX_PIXELS, ImageError, open_image
from prompt_diffusion.store.lettering import Lettering

_CELL_PIXELS = 128
_GAP_PIXELS = 8
_LABEL_PIXELS = 320
_HEADER_PIXELS = 36
_FONT_PIXELS = 13
_BACKGROUND, _INK, _PALE = (255, 255, 255), (32, 32, 32), (120, 120, 120)
_MISSING = (224, 224, 224)

Cells = dict[str, bytes | None]


def draw_contact_sheet(title: str, names: list[str], cells: list[Cells], texts: list[list[str]]) -> bytes:
    """Return a PNG: a title, the names of the cells, then one line per row with its texts at the left.

    ``cells`` and ``texts`` have one element a row; a name that a row lacks becomes a grey cell. ValueError for bytes that
    are no image.
    """
    pitch = _CELL_PIXELS + _GAP_PIXELS
    top = 2 * _GAP_PIXELS + _FONT_PIXELS + _HEADER_PIXELS
    size = (_LABEL_PIXELS + pitch * len(names) + _GAP_PIXELS, top + pitch * len(cells))
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = Lettering(_FONT_PIXELS)
    font.write(draw, (_GAP_PIXELS, _GAP_PIXELS), font.spell(title), _INK)
    for column, name in enumerate(names):
        left = _LABEL_PIXELS + pitch * column
        _write_lines(draw, (left, top - _HEADER_PIXELS), [name.replace("_", " ")], _CELL_PIXELS, 2, font, _PALE)
    for line, (row, words) in enumerate(zip(cells, texts, strict=True)):
        y = top + pitch * line
        identifiers = " · ".join(word for word in words if word and not _is_sentence(word))
        sentences = [word for word in words if _is_sentence(word)]
        width, line_pixels = _LABEL_PIXELS - 2 * _GAP_PIXELS, _FONT_PIXELS + 3
        _write_lines(draw, (_GAP_PIXELS, y), [identifiers], width, 1, font, _PALE)
        num_lines = _CELL_PIXELS // line_pixels - 1
        _write_lines(draw, (_GAP_PIXELS, y + line_pixels), sentences, width, num_lines, font, _INK)
        for column, name in enumerate(names):
            sheet.paste(_draw_cell(row.get(name), name, words), (_LABEL_PIXELS + pitch * column, y))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _is_sentence(text: str) -> bool:
    """Say whether a text is prose: it has spaces, or letters of scripts that are written without them."""
    return " " in text or any("\u2e80" <= letter <= "\uffdc" for letter in text)


def _draw_cell(data: bytes | None, name: str, words: list[str]) -> Image.Image:
    """Return the image in a square cell, its shape kept; a grey cell where there is none."""
    cell = Image.new("RGB", (_CELL_PIXELS, _CELL_PIXELS), _MISSING)
    if data is None:
        return cell
    try:
        with open_image(data) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ImageError(f"the image has {opened.width} x {opened.height} pixels, more than {MAX_PIXELS}")
            image = opened.convert("RGB")
    except ImageError as error:
        raise ValueError(f"the column {name!r} of the row {' / '.join(words)!r} cannot be drawn: {error}") from error
    scale = _CELL_PIXELS / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # Enlarged pixels stay visible as pixels: this is a look at the data.
    filter_used = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    resized = image.resize((width, height), filter_used)
    cell.paste(resized, ((_CELL_PIXELS - width) // 2, (_CELL_PIXELS - height) // 2))
    return cell


def _write_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    texts: list[str],
    width: int,
    num_lines: int,
    font: Lettering,
    ink: tuple[int, int, int],
) -> None:
    """Write texts one under the other, each wrapped at ``width`` pixels, ``num_lines`` lines at most."""
    lines = [line for text in texts for line in _wrap_text(font.spell(text), width, font)]
    if len(lines) > num_lines:
        lines = [*lines[: num_lines - 1], lines[num_lines - 1][:-1] + "..."]
    for number, line in enumerate(lines):
        font.write(draw, (corner[0], corner[1] + number * (_FONT_PIXELS + 3)), line, ink)


def _wrap_text(text: str, width: int, font: Lettering) -> list[str]:
    """Return the text in lines of at most ``width`` pixels, broken at spaces, and inside a word that is too long."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.measure(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.measure(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
