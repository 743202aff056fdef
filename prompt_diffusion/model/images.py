"""Images into and out of the pipeline: any kind and mode in, one range inside, the kinds that diffusers knows out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prompt_diffusion.data.transforms import (
    Pixels,
    decode_image,
    from_model_range,
    normalise_image,
    read_image_file,
    to_model_range,
)

Picture = NDArray[np.uint8] | NDArray[np.float32]
"""One RGB image as H, W, 3: uint8, or float32 in [0, 1]."""
Images = Image.Image | NDArray[Any] | Tensor | str | Path | list[Any] | tuple[Any, ...]
"""One image or a batch: PIL of any mode; the path of a file; arrays of H, W or H, W, C or N, H, W, C (uint8, uint16, or floats
in [0, 1]); tensors of C, H, W or N, C, H, W (the same types); a list of any. C is 1 (grey), 3, or 4 (alpha, over white)."""
OutputType = Literal["pil", "np", "pt", "uint8", "latent"]
_CHANNELS = (1, 3, 4)


def check_output_type(output_type: str) -> None:
    """Raise ValueError for an output type that there is not."""
    if output_type not in get_args(OutputType):
        raise ValueError(f"unknown output_type {output_type!r}: choose one of {', '.join(get_args(OutputType))}")


def read_images(images: Images, name: str) -> list[Picture]:
    """Return every image of a batch alone, as RGB; ``name`` says in a ValueError whose they are."""
    if isinstance(images, Image.Image):
        return [_read_image(images, name)]
    if isinstance(images, str | Path):
        return [_read_file(Path(images), name)]
    if isinstance(images, Tensor):
        batch = images if images.ndim == 4 else images[None]
        return [_read_tensor(image, name) for image in batch]
    if isinstance(images, np.ndarray):
        is_batch = images.ndim == 4
        return [_read_array(image, name) for image in (images if is_batch else images[None])]
    if not isinstance(images, list | tuple):
        raise ValueError(
            f"{name}: an image is PIL, a path, an array, a tensor, or a list of them, got {type(images).__name__}"
        )
    return [picture for image in images for picture in read_images(image, name)]


def _read_image(image: Image.Image, name: str) -> Picture:
    try:
        return normalise_image(image)
    except (ValueError, OSError) as error:  # a file that is read only now may be cut short
        raise ValueError(f"{name}: {error}") from error


def _read_file(path: Path, name: str) -> Picture:
    try:
        return decode_image(read_image_file(path))
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if str(path) in str(error) else f"{name}: {path}: {error}") from error


def _read_tensor(image: Tensor, name: str) -> Picture:
    if image.ndim != 3 or image.shape[0] not in _CHANNELS:
        raise ValueError(f"{name}: tensors are C, H, W or N, C, H, W with 1, 3 or 4 channels, got {tuple(image.shape)}")
    values = image.detach().cpu().permute(1, 2, 0)
    return _read_array((values.float() if values.is_floating_point() else values).numpy(), name)


def _read_array(image: NDArray[Any], name: str) -> Picture:
    """Return RGB of one array: integers as Pillow's modes are read, floats kept."""
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in _CHANNELS or 0 in image.shape:
        raise ValueError(f"{name}: arrays are H, W, C or N, H, W, C with 1, 3 or 4 channels, got {image.shape}")
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.dtype == np.uint8:
        pixels = image[:, :, 0] if image.shape[2] == 1 else image
        return image if image.shape[2] == 3 else normalise_image(Image.fromarray(np.ascontiguousarray(pixels)))
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"{name}: images are uint8, uint16, or floats in [0, 1], got {image.dtype}")
    if not (image.min() >= 0.0 and image.max() <= 1.0):  # NaN is neither
        raise ValueError(
            f"{name}: images of floats are in [0, 1], got values from {image.min():.4g} to {image.max():.4g}: "
            "scale them, or give uint8"
        )
    floats: NDArray[np.float32] = image.astype(np.float32)
    if floats.shape[2] == 4:
        colours, alpha = floats[..., :3], floats[..., 3:]
        floats = colours * alpha + (np.float32(1.0) - alpha)
    return np.broadcast_to(floats, (*floats.shape[:2], 3))


def show_size(picture: Picture) -> str:
    """Return an image's height and width for a sentence."""
    return f"{picture.shape[0]} x {picture.shape[1]}"


def fit_picture(picture: Picture, height: int, width: int) -> Picture:
    """Cut the largest centred part of the wanted aspect and resize it once, by Lanczos, as ``resize_image`` does to squares."""
    rows, columns = picture.shape[:2]
    if (rows, columns) == (height, width):
        return picture
    cut_rows = min(rows, max(1, round(columns * height / width)))
    cut_columns = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
    part = np.ascontiguousarray(picture[top : top + cut_rows, left : left + cut_columns])
    if part.dtype == np.uint8:
        return np.array(Image.fromarray(part).resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint8)
    channels = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(part[..., c])).resize((width, height), Image.Resampling.LANCZOS)
        )
        for c in range(3)
    ]
    return np.stack(channels, axis=-1).clip(0.0, 1.0)  # Lanczos overshoots at edges


def stack_pictures(pictures: Sequence[Picture]) -> Tensor:
    """Return float32 N, 3, H, W in [-1, 1]: exactly what training sees of the same uint8 images."""
    if all(picture.dtype == np.uint8 for picture in pictures):
        return to_model_range(np.stack(pictures).astype(np.uint8))
    unit = [p.astype(np.float32) / 255.0 if p.dtype == np.uint8 else p for p in pictures]
    return torch.from_numpy(np.stack(unit)).permute(0, 3, 1, 2).to(torch.float32) * 2.0 - 1.0


def write_images(images: Tensor, output_type: OutputType) -> Any:  # noqa: ANN401 - as many types as output types
    """Turn N, 3, H, W in [-1, 1] into an output type: ``pt`` and ``np`` are not rounded to 8 bit, ``pil`` and ``uint8`` are.

    ValueError where a value is NaN, which no kind of image can show.
    """
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            f"the pictures have values that are not finite, in {str(images.dtype).removeprefix('torch.')}: after float16 take "
            "float32 or bfloat16, else another scheduler or a smaller eta"
        )
    if output_type in ("np", "pt"):
        unit = (images.detach().float() / 2.0 + 0.5).clamp(0.0, 1.0)
        return unit if output_type == "pt" else unit.cpu().permute(0, 2, 3, 1).numpy()
    pixels = from_model_range(images)
    return pixels if output_type == "uint8" else [Image.fromarray(image) for image in pixels]


def convert_pixels(pixels: Pixels, output_type: OutputType) -> Any:  # noqa: ANN401 - as many types as output types
    """Turn uint8 N, H, W, 3 into an output type; they stay as they are where that is ``latent``."""
    return pixels if output_type == "latent" else write_images(to_model_range(pixels), output_type)
