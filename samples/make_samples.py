"""Draws the pictures of this folder again: two ray-cast scenes with their exact maps, and a photograph from scikit-image."""

from pathlib import Path

from PIL import Image
from skimage import data

from prompt_diffusion.data.sources.scenes import build_scene_pair
from prompt_diffusion.data.transforms import encode_png

FOLDER = Path(__file__).parent
SCENES = {"scene": 2, "other": 4}
SIDE = 128
WORLD = 2305


def main() -> None:
    """Write every picture."""
    for name, index in SCENES.items():
        pair = build_scene_pair(WORLD, index, SIDE)
        (FOLDER / f"{name}.png").write_bytes(encode_png(pair.input.image))
        (FOLDER / f"{name}-edited.png").write_bytes(encode_png(pair.edited.image))
        for condition, pixels in pair.input.maps.items():
            (FOLDER / f"{name}-{condition}.png").write_bytes(encode_png(pixels))
    photograph = Image.fromarray(data.coffee()[:, 100:500]).resize((256, 256), Image.Resampling.LANCZOS)
    photograph.save(FOLDER / "photo.jpg", quality=92)


if __name__ == "__main__":
    main()
