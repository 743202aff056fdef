"""What a source is: it plans its samples in source order, and reads any of them as image pairs or rejects."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from prompt_diffusion.data.records import ImagePair, Split
from prompt_diffusion.data.transforms import decode_image, encode_png, resize_image
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.fingerprint import compute_digest, write_canonical_json
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import list_sizes, read_bytes


class SourceOptions(FrozenModel):
    """What the configurations of all sources share."""

    def list_scientific(self) -> dict[str, Any]:
        """Return the fields that shape the samples: all but the place where the source lies."""
        return self.model_dump(mode="json", exclude={"uri"})


@dataclass(frozen=True, slots=True)
class SampleKey:
    """One sample as its source knows it before reading it."""

    sample_id: str
    group_id: str
    seed: int
    file: str = ""
    """The file that holds it, relative to the source."""
    row: int = 0
    """Its row in that file."""
    split: Split = "train"
    """Set by the ingest from the groups' order."""


class Source(Protocol):
    """Where image pairs come from."""

    def digest(self) -> str:
        """Return a digest of the content that lies there, wherever that is; "" where the configuration says all."""
        ...

    def plan(self) -> list[SampleKey]:
        """Return every sample in source order, without reading an image."""
        ...

    def read(self, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Yield one pair or reject for each key, in order."""
        ...


def load_picture(data: bytes, image_size: int | None) -> bytes:
    """Return an image file as PNG of (image_size, image_size); ValueError with the reason where that cannot be done.

    None leaves the file as it is: an annotator decodes it at its own resolution.
    """
    if image_size is None:
        return data
    return encode_png(resize_image(decode_image(data), image_size))


def read_file(uri: str, name: str) -> bytes:
    """Return a file of a sample; ValueError names it, relative to its source, where there is none, or it lies elsewhere.

    Other errors of the store pass: a lost connection must not become a reject that stays.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "://" in name:
        raise ValueError(f"{name} does not lie in the folder of its source")
    try:
        return read_bytes(uri)
    except FileNotFoundError as error:
        raise ValueError(f"{name} is missing") from error


def digest_listing(uri: str, *contents: bytes) -> str:
    """Return a digest of the names and sizes of all files below a folder, and of the given contents.

    Hundreds of gigabytes are not read for it: an image that is changed in place to one of the same size goes unseen.
    """
    listing = [list_sizes(uri), [compute_digest(content) for content in contents]]
    return compute_digest(write_canonical_json(listing).encode())


def check_captions(texts: Mapping[str, object], needed: Sequence[str]) -> dict[str, str]:
    """Return the texts stripped, "" for an absent one; ValueError names a needed one that is missing or no text."""
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} is a {type(text).__name__}, not a text")
    found = {name: str(text or "").strip() for name, text in texts.items()}
    missing = [name for name in needed if not found[name]]
    if missing:
        raise ValueError(f"the caption is missing: {', '.join(missing)}")
    return found
