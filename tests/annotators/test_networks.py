"""Our batched paths against the libraries' own one-image paths, with identical weights.

The weights are random where the real ones need a hub; the networks are of the same classes, MiDaS at its real size.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from prompt_diffusion.annotators import depth, segmentation
from prompt_diffusion.annotators.ade20k import PALETTE
from prompt_diffusion.annotators.base import AnnotateResources, Annotator
from prompt_diffusion.annotators.bounds import BoundedAnnotator
from prompt_diffusion.annotators.network_spec import Infer, NetworkAnnotator
from prompt_diffusion.annotators.networks import load_transformer, to_device, to_maps
from prompt_diffusion.annotators.relief import build_midas_network, compute_normals, stretch_range
from prompt_diffusion.annotators.table import ANNOTATORS, build_annotator
from prompt_diffusion.annotators.weights import WeightFile, parse_arrays
from prompt_diffusion.store.fingerprint import compute_digest

Images = npt.NDArray[np.uint8]
Crops = Callable[[int, int, int], Images]
OneImage = Callable[[Images], Images]

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
# What OneFormerProcessor makes of "the task is semantic" with CLIP's vocabulary.
SEMANTIC_TASK = [49406, 518, 10549, 533, 29119, 1550, 49407] + 70 * [0]


def check_parity(annotator: Annotator, one_image: OneImage, images: Images, min_std: float = 10.0) -> None:
    """At most one grey level apart on 99.9 % of pixels, and equal on 99 %, image by image, on maps that show something."""
    inner = annotator.annotator if isinstance(annotator, BoundedAnnotator) else annotator
    assert isinstance(inner, NetworkAnnotator)
    with torch.inference_mode():  # the whole batch at once, as on a GPU; `annotate` takes it apart on a CPU
        maps = to_maps(inner.infer(to_device(images, "cpu")))
    assert np.abs(annotator.annotate(images).astype(int) - maps).mean() < 0.1
    assert maps.dtype == np.uint8
    assert maps.shape == images.shape
    for image, ours in zip(images, maps, strict=True):
        theirs = np.asarray(one_image(image))
        theirs = theirs if theirs.ndim == 3 else np.repeat(theirs[..., None], 3, axis=2)
        assert theirs.shape == ours.shape
        assert theirs.std() > min_std, "a flat map would compare equal to any other"
        difference = np.abs(ours.astype(int) - theirs).max(axis=2)
        far, differs = (difference > 1).mean(), (difference > 0).mean()
        assert far <= 0.001, f"{far:.2%} of the pixels are more than one grey level apart"
        assert differs <= 0.01, f"{differs:.2%} of the pixels differ: rounded, where they are cut off, or the other way"


def build_from_file(name: str, file: Path) -> Annotator:
    """Build as a stage does: the file is read, checked and parsed."""
    resources = AnnotateResources(weights=str(file), num_threads=1, device="cpu")
    return build_annotator(name, resources, compute_digest(file.read_bytes()))


def wrap(infer: Infer) -> Annotator:
    return NetworkAnnotator("wrapped", 1, "", infer, "cpu")


def randomise(network: nn.Module, gain: float = 1.0) -> nn.Module:
    """Draw new weights, wide enough that what comes out varies."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * fan_in**-0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.fixture(scope="session")
def midas(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """MiDaS at its real size with random weights, and the file of them."""
    torch.manual_seed(0)
    network = build_midas_network().eval().requires_grad_(False)
    file = tmp_path_factory.mktemp("midas") / "dpt_hybrid.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    return network, file


@pytest.fixture(scope="session")
def midas_detector(midas: tuple[nn.Module, Path]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from controlnet_aux import MidasDetector
        from controlnet_aux.midas.midas.dpt_depth import DPTDepthModel

        theirs = DPTDepthModel(path=None, backbone="vitb_rn50_384", non_negative=True)  # with their own hooks
    theirs.load_state_dict(midas[0].state_dict())
    return MidasDetector(theirs.eval())


def test_midas_depth_equals_controlnet_auxs(midas, midas_detector, crops: Crops) -> None:
    def one_image(image: Images) -> Images:
        return midas_detector(image, detect_resolution=128, image_resolution=128)

    check_parity(build_from_file("depth_midas", midas[1]), one_image, crops(3, 128, 192))


def test_midas_normals_equal_controlnet_auxs_with_the_channels_in_published_order(
    midas, midas_detector, crops: Crops
) -> None:
    # Random weights predict a nearly flat relief: made steeper, alike for both, so that normals point somewhere.
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = midas[0]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            prediction = self.inner(images)
            return (prediction - prediction.mean()) / prediction.std() * 10.0

    steep = Steep()
    midas_detector = type(midas_detector)(steep)

    def one_image(image: Images) -> Images:
        _, normals = midas_detector(image, depth_and_normal=True, detect_resolution=128, image_resolution=128)
        return np.ascontiguousarray(normals[..., ::-1])

    ours = wrap(lambda images: compute_normals(steep(images.float() / 127.5 - 1.0)) * 127.5 + 127.5)
    check_parity(ours, one_image, crops(1, 128, 128))
    flat = build_from_file("normal_midas", midas[1]).annotate(crops(2, 64, 64))
    assert (flat[..., 2] >= 253).all(), "a flat relief faces the viewer: blue is z"


def test_two_midas_networks_in_one_process_keep_their_features_apart() -> None:
    first, second = build_midas_network(), build_midas_network()
    first.pretrained.model.patch_embed.backbone.stages[0](torch.zeros(1, 64, 8, 8))  # type: ignore[union-attr, operator]
    assert "1" in first.pretrained.activations  # type: ignore[operator, union-attr]
    assert "1" not in second.pretrained.activations  # type: ignore[operator, union-attr]


def test_threads_that_share_an_annotator_get_their_own_maps(midas, crops: Crops) -> None:
    annotator = build_from_file("depth_midas", midas[1])
    images = np.split(crops(2, 64, 64), 2)
    expected = [annotator.annotate(image).astype(int) for image in images]
    assert np.abs(expected[0] - expected[1]).mean() > 10

    def annotate_often(image: Images) -> list[Images]:
        torch.set_num_threads(1)
        return [annotator.annotate(image) for _ in range(6)]

    with ThreadPoolExecutor(2) as threads:
        for maps, alone in zip(threads.map(annotate_often, images), expected, strict=True):
            assert all(np.abs(map_ - alone).max() <= 1 for map_ in maps)


def test_a_map_does_not_depend_on_its_batch_and_any_size_is_taken(midas, crops: Crops) -> None:
    annotator = build_from_file("depth_midas", midas[1])
    images = crops(2, 60, 85)
    together = annotator.annotate(images).astype(int)
    alone = np.concatenate([annotator.annotate(image[None]) for image in images]).astype(int)
    assert together.shape == images.shape
    assert np.abs(together - alone).max() <= 1
    assert annotator.annotate(images[:0]).shape == (0, 60, 85, 3)


def test_a_constant_prediction_gives_a_valid_map() -> None:
    flat = torch.full((2, 8, 8), 3.0)
    assert (stretch_range(flat) == 0).all()
    normals = compute_normals(flat)
    assert (normals == torch.tensor([0.0, 0.0, 1.0])).all()


def test_a_depth_maps_range_is_each_images_own_and_near_is_bright() -> None:
    near_left = torch.arange(8.0).flip(0).expand(8, 8)
    stretched = stretch_range(torch.stack([near_left, 100 * near_left + 7]))
    assert torch.allclose(stretched[0], stretched[1])
    assert (stretched[:, :, 0] == 1).all()
    assert (stretched[:, :, -1] == 0).all()


def test_normals_are_opencvs_sobel_made_unit_long_and_flat_in_the_background() -> None:
    relief = np.random.default_rng(0).random((9, 11)).astype(np.float32)
    x, y = cv2.Sobel(relief, cv2.CV_32F, 1, 0, ksize=3), cv2.Sobel(relief, cv2.CV_32F, 0, 1, ksize=3)
    stretched = (relief - relief.min()) / (relief.max() - relief.min())
    x[stretched < 0.1] = 0
    y[stretched < 0.1] = 0
    expected = np.stack([x, y, np.full_like(x, 2 * np.pi)], axis=2)
    expected /= np.linalg.norm(expected, axis=2, keepdims=True)
    np.testing.assert_allclose(compute_normals(torch.from_numpy(relief)[None])[0].numpy(), expected, atol=1e-5)
    assert (stretched < 0.1).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_normals_of_the_smallest_reliefs_are_opencvs_too(shape: tuple[int, int]) -> None:
    relief = 1 + np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    x, y = cv2.Sobel(relief, cv2.CV_32F, 1, 0, ksize=3), cv2.Sobel(relief, cv2.CV_32F, 0, 1, ksize=3)
    expected = np.stack([x, y, np.full_like(x, 2 * np.pi)], axis=2)
    expected.reshape(-1, 3)[0, :2] = 0  # the farthest pixel is background
    expected /= np.linalg.norm(expected, axis=2, keepdims=True)
    np.testing.assert_allclose(compute_normals(torch.from_numpy(relief)[None])[0].numpy(), expected, atol=1e-5)


def test_lineart_equals_controlnet_auxs(tmp_path: Path, crops: Crops) -> None:
    from controlnet_aux import LineartDetector
    from controlnet_aux.lineart import Generator

    network = randomise(Generator(3, 1, 3), gain=1.5)
    torch.save(network.state_dict(), tmp_path / "sk_model.pth")
    detector = LineartDetector(network, network)
    annotator = build_from_file("lineart", tmp_path / "sk_model.pth")

    def one_image(image: Images) -> Images:
        return detector(image, detect_resolution=64, image_resolution=64, output_type="np")

    check_parity(annotator, one_image, crops(3, 64, 128))
    for height, width in ((33, 50), (1, 1), (3, 40)):
        assert annotator.annotate(crops(2, height, width)).shape == (2, height, width, 3)


def test_hed_equals_controlnet_auxs(tmp_path: Path, crops: Crops) -> None:
    from controlnet_aux import HEDdetector
    from controlnet_aux.hed import ControlNetHED_Apache2

    network = randomise(ControlNetHED_Apache2(), gain=1.5)
    with torch.no_grad():
        network.norm.fill_(120.0)  # type: ignore[union-attr, operator]
        for block in (network.block1, network.block2, network.block3, network.block4, network.block5):
            block.projection.weight.mul_(0.05)  # type: ignore[union-attr, operator]
    torch.save(network.state_dict(), tmp_path / "ControlNetHED.pth")
    detector = HEDdetector(network)

    def one_image(image: Images) -> Images:
        return detector(image, detect_resolution=64, image_resolution=64, output_type="np")

    check_parity(build_from_file("hed_controlnet", tmp_path / "ControlNetHED.pth"), one_image, crops(3, 64, 128))


def build_tiny(kind: str) -> Any:
    """Return a network of the real class, two orders smaller, with random weights."""
    from transformers import (
        ConvNextConfig,
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        OneFormerConfig,
        OneFormerForUniversalSegmentation,
        SwinConfig,
        UperNetConfig,
        UperNetForSemanticSegmentation,
    )

    torch.manual_seed(1)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if kind == "depth_anything":
        backbone = Dinov2Config(
            hidden_size=32,
            num_attention_heads=2,
            num_hidden_layers=4,
            image_size=56,
            out_features=stages,
            reshape_hidden_states=False,
        )
        config = DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
        return randomise(DepthAnythingForDepthEstimation(config), gain=2.0)
    if kind == "upernet":
        convnext = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], out_features=stages)
        return randomise(
            UperNetForSemanticSegmentation(
                UperNetConfig(backbone_config=convnext, auxiliary_in_channels=16, hidden_size=16, num_labels=150)
            ),
            gain=2.0,
        )
    swin = SwinConfig(
        image_size=64, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_features=stages
    )
    small = {"hidden_dim": 32, "conv_dim": 32, "mask_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
    config = OneFormerConfig(
        backbone_config=swin,
        num_labels=150,
        num_queries=20,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        **small,
    )
    return randomise(OneFormerForUniversalSegmentation(config), gain=2.0)


@torch.inference_mode()
def test_depth_anything_equals_transformers_pipeline(crops: Crops) -> None:
    from transformers import DPTImageProcessor, pipeline

    network = build_tiny("depth_anything")
    processor = DPTImageProcessor(
        size={"height": 70, "width": 70},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        do_pad=False,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    estimate = pipeline("depth-estimation", model=network, image_processor=processor)

    def one_image(image: Images) -> Images:
        return np.asarray(estimate(Image.fromarray(image))["depth"])

    check_parity(wrap(depth.wrap_depth_anything(network, 70)), one_image, crops(3, 61, 90))


@pytest.mark.parametrize("kind", ["depth_anything", "upernet", "oneformer"])
def test_networks_see_colours_normalised_as_they_were_trained(kind: str, crops: Crops) -> None:
    seen: list[torch.Tensor] = []

    def record(pixel_values: torch.Tensor, task_inputs: torch.Tensor | None = None, **_: object) -> object:
        seen.append(pixel_values)
        if task_inputs is not None:
            assert task_inputs.tolist() == 2 * [SEMANTIC_TASK]
        num = len(pixel_values)
        return SimpleNamespace(
            predicted_depth=torch.zeros(num, 70, 70),
            logits=torch.zeros(num, 150, 18, 18),
            class_queries_logits=torch.zeros(num, 5, 151),
            masks_queries_logits=torch.zeros(num, 5, 18, 18),
        )

    infers: dict[str, Callable[[], Infer]] = {
        "depth_anything": lambda: depth.wrap_depth_anything(record, 70),
        "upernet": lambda: segmentation.wrap_upernet(record, 70),
        "oneformer": lambda: segmentation.wrap_oneformer(record, {"shortest_edge": 70, "longest_edge": 70}),
    }
    images = crops(2, 70, 70)
    infers[kind]()(to_device(images, "cpu"))
    expected = (images / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(seen[0].permute(0, 2, 3, 1), expected, atol=1e-4)


@torch.inference_mode()
def test_upernet_equals_transformers_one_image_path(crops: Crops) -> None:
    from transformers import SegformerImageProcessor

    network = build_tiny("upernet")
    processor = SegformerImageProcessor(size={"height": 96, "width": 96})

    def one_image(image: Images) -> Images:
        inputs = processor(images=Image.fromarray(image), return_tensors="pt")
        found = processor.post_process_semantic_segmentation(network(**inputs), target_sizes=[image.shape[:2]])
        return np.array(PALETTE, np.uint8)[found[0].numpy()]

    check_parity(wrap(segmentation.wrap_upernet(network, 96)), one_image, crops(3, 61, 90))


@torch.inference_mode()
def test_oneformer_equals_transformers_one_image_path(crops: Crops) -> None:
    from transformers import OneFormerImageProcessor

    network = build_tiny("oneformer")
    size = {"shortest_edge": 96, "longest_edge": 200}
    processor = OneFormerImageProcessor(size=size)
    tokens = torch.tensor([SEMANTIC_TASK])

    def one_image(image: Images) -> Images:
        inputs = processor(images=Image.fromarray(image), task_inputs=["semantic"], return_tensors="pt")
        outputs = network(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"], task_inputs=tokens)
        found = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])
        return np.array(PALETTE, np.uint8)[found[0].numpy()]

    check_parity(wrap(segmentation.wrap_oneformer(network, size)), one_image, crops(3, 61, 90))


def test_the_palette_is_controlnet_auxs() -> None:
    from controlnet_aux.util import ade_palette

    assert [list(colour) for colour in PALETTE] == ade_palette()
    assert len(PALETTE) == 150


def test_real_networks_are_configured_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: dict[str, Any] = {}
    num_parameters: dict[str, int] = {}
    sizes: dict[str, object] = {}

    def count(model_class: Any, config: Any, arrays: object, name: str) -> Any:
        configs[name] = config
        with torch.device("meta"):
            num_parameters[name] = sum(parameter.numel() for parameter in model_class(config).parameters())
        return SimpleNamespace(to=lambda _: name)

    monkeypatch.setattr("prompt_diffusion.annotators.networks.load_transformer", count)
    for module, wrapper in (
        (depth, "wrap_depth_anything"),
        (segmentation, "wrap_upernet"),
        (segmentation, "wrap_oneformer"),
    ):
        monkeypatch.setattr(module, wrapper, sizes.__setitem__)
    depth.build_depth_anything({}, "anything", "cpu")
    segmentation.build_upernet({}, "upernet", "cpu")
    queries = {"model.transformer_module.queries_embedder.weight": np.zeros((250, 256), np.float32)}
    segmentation.build_oneformer(queries, "oneformer", "cpu")

    assert num_parameters == {"anything": 24_785_089, "upernet": 81_877_196, "oneformer": 218_814_220}
    assert sizes == {"anything": 518, "upernet": 512, "oneformer": {"shortest_edge": 640, "longest_edge": 2560}}
    # What changes no parameter's shape, and would load in silence.
    assert configs["anything"].backbone_config.out_features == ["stage3", "stage6", "stage9", "stage12"]
    assert configs["anything"].backbone_config.num_attention_heads == 6
    assert configs["upernet"].backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    swin = configs["oneformer"].backbone_config
    assert list(swin.num_heads) == [6, 12, 24, 48]
    assert (swin.window_size, swin.image_size) == (12, 384)
    assert swin.out_features == ["stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize("kind", ["depth_anything", "upernet", "oneformer"])
def test_saved_weights_are_loaded_whole_under_their_public_names(kind: str, tmp_path: Path, capfd) -> None:
    network = build_tiny(kind)
    network.save_pretrained(tmp_path)
    capfd.readouterr()
    file = WeightFile("model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    loaded = load_transformer(type(network), network.config, parse_arrays(file), "model.safetensors")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-7, atol=0, msg=name)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("kind", ["depth_anything", "upernet", "oneformer"])
def test_weights_that_lack_or_bend_a_parameter_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    network = build_tiny(kind)
    network.save_pretrained(tmp_path)
    arrays = {name: tensor.numpy() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    names = (name for name in arrays if name.endswith("weight") and name in network.state_dict())
    first = next(name for name in names if not name.startswith("criterion."))
    lacking = {name: array for name, array in arrays.items() if name != first}
    with pytest.raises(ValueError, match=f"weights small.bin do not fit .*: {first} is missing there"):
        load_transformer(type(network), network.config, lacking, "small.bin")
    bent = {**arrays, first: np.zeros((2, 3), np.float32)}
    with pytest.raises(ValueError, match=rf"{first} is \(2, 3\) there and"):
        load_transformer(type(network), network.config, bent, "small.bin")


def test_weights_of_another_network_are_refused_by_name(midas, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("depth_midas", "lineart", "hed_controlnet"):
        with pytest.raises(ValueError, match=r"weights other\.safetensors do not fit"):
            build_from_file(name, tmp_path / "other.safetensors")
    for name in ("depth_anything_v2", "seg_upernet", "seg_oneformer"):
        with pytest.raises(ValueError, match=r"weights other\.safetensors do not fit"):
            build_from_file(name, tmp_path / "other.safetensors")


def test_every_condition_has_an_annotator() -> None:
    made = {spec.condition for spec in ANNOTATORS.values()}
    assert made == {"depth", "hed", "seg", "normal", "canny", "scribble", "lineart"}
