"""What is taken for an image, and that there is one door for all of them."""

import ast
import io
import os
import stat
from pathlib import Path

import pytest
from PIL import Image

from prompt_diffusion.data.transforms import decode_image, normalise_image
from prompt_diffusion.generation import read_record
from prompt_diffusion.image_files import IMAGE_FORMATS, open_image
from prompt_diffusion.store.contact_sheet import draw_contact_sheet

_ROOT = Path(__file__).parents[1]
_DOOR = Path("prompt_diffusion/image_files.py")
_TREES = ("prompt_diffusion", "flows", "tasks", "benchmarks", "infra", "examples")
# Functions that decode a file or a stream of some other kind than the door knows, or fetch what a text names.
_OTHER_DECODERS = {
    "imread", "imdecode", "imreadmulti", "VideoCapture", "read_image", "decode_image", "decode_jpeg", "read_video",
    "load_image", "load_video", "ImageCollection", "get_reader", "urlretrieve",
}  # fmt: skip
_OUR_OWN = {"read_image", "decode_image"}  # of data/transforms.py and registry/serving.py, which go through the door
_OTHER_LIBRARIES = {"cv2", "skimage.io", "imageio", "matplotlib.image", "torchvision.io", "diffusers.utils"}


def list_calls(tree):
    """Yield (dotted name with imports resolved, line) of every call; what is imported under another name counts too."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                names[(each.asname or each.name).split(".")[0]] = each.name if each.asname else each.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for each in node.names:
                names[each.asname or each.name] = f"{node.module}.{each.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.Attribute | ast.Name):
            target = node.func if isinstance(node, ast.Call) else node
            parts = []
            while isinstance(target, ast.Attribute):
                parts.append(target.attr)
                target = target.value
            if isinstance(target, ast.Name):
                yield ".".join([names.get(target.id, target.id), *reversed(parts)]), node.lineno


def find_decoders(path):
    found = set()
    for name, line in list_calls(ast.parse(path.read_text())):
        library, _, function = name.rpartition(".")
        opens = name in ("PIL.Image.open", "PIL.ImageFile.Parser", "PIL.Image.Image.open")
        if library.startswith("PIL.") and function in ("open", "Parser"):
            opens = True
        if function in _OTHER_DECODERS and not (function in _OUR_OWN and library.startswith("prompt_diffusion")):
            opens |= bool(library)
        if library in _OTHER_LIBRARIES and function in _OTHER_DECODERS:
            opens = True
        if opens:
            found.add((name, line))
    return found


def test_image_files_are_opened_in_one_place():
    found = {}
    for tree in _TREES:
        for path in (_ROOT / tree).rglob("*.py"):
            if decoders := find_decoders(path):
                found[path.relative_to(_ROOT)] = sorted(decoders)
    assert set(found) == {_DOOR}, found
    assert {name for name, _ in found[_DOOR]} == {"PIL.Image.open"}


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\nImage.open(f)",
        "from PIL import Image as I\nI.open(f)",
        "from PIL.Image import open as look\nlook(f)",
        "import PIL.Image\nPIL.Image.open(f)",
        "import cv2\ncv2.imread(f)",
        "from diffusers.utils import load_image\nload_image('http://example.org/a.png')",
        "from PIL import Image\nread = map(Image.open, files)",
    ],
)
def test_the_search_for_other_places_finds_them_under_any_name(source, tmp_path):
    (tmp_path / "module.py").write_text(source)
    assert find_decoders(tmp_path / "module.py")


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Put a program named gs first on the path, and return the file that it leaves when it is run."""
    from PIL import EpsImagePlugin

    ran = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what Pillow remembers of an earlier search
    return ran


@pytest.fixture
def eps():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "EPS")
    return buffer.getvalue()


def test_pillow_left_to_choose_would_run_ghostscript(ghostscript, eps):
    with pytest.raises(OSError, match=r"."):
        Image.open(io.BytesIO(eps)).load()
    assert ghostscript.exists()


def test_no_door_hands_a_file_to_ghostscript(ghostscript, eps, tmp_path):
    for door in (
        decode_image,
        read_record,
        lambda data: draw_contact_sheet("title", ["image"], [{"image": data}], [["row"]]),
        lambda data: normalise_image(Image.open(io.BytesIO(data))),  # opened by a caller, decoded by us
    ):
        with pytest.raises(ValueError, match=r"not an image file|identify|comes from a EPS file"):
            door(eps)
    assert not ghostscript.exists()


def test_every_format_that_is_taken_can_be_read_and_every_other_is_refused():
    Image.init()
    refused = set()
    for name in sorted(Image.SAVE.keys() & Image.OPEN.keys()):
        for mode in ("RGB", "RGBA", "P", "1"):
            buffer = io.BytesIO()
            try:
                Image.new("RGB", (16, 16), "red").convert(mode).save(buffer, name)
            except (OSError, ValueError, KeyError, AttributeError):  # a format that takes no such pixels, or only reads
                continue
            if name in IMAGE_FORMATS:
                assert decode_image(buffer.getvalue()).shape == (16, 16, 3)
            elif name != "MPO":  # of one picture, it is a JPEG
                with pytest.raises(ValueError, match="not an image file"):
                    decode_image(buffer.getvalue())
                refused.add(name)
    assert {"EPS", "ICO", "TGA", "PCX"} <= refused


def test_an_image_of_our_own_making_has_no_format_to_refuse():
    assert normalise_image(Image.new("RGB", (2, 2), "red"))[0, 0].tolist() == [255, 0, 0]
    png = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(png, "PNG")
    with open_image(png.getvalue()) as image:
        assert image.format == "PNG"
