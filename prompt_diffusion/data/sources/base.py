"""What a source is: it plans its samples in source order, and reads any of them as image pairs or rejects."""

import errno
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prompt_diffusion.data.records import ImagePair, Split
from prompt_diffusion.data.transforms import WHITE_16_BIT, decode_image, encode_png, resize_image
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.retries import describe_error, is_denied
from prompt_diffusion.store.storage import exists, read_bytes
from prompt_diffusion.store.uris import join_uri, local_path

_NAME_BYTES = 1024  # S3's limit
# What the operating system says of a name or of one file, not of the disk or the network.
_OF_ONE_FILE = (
    errno.EACCES, errno.EPERM, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO,
)  # fmt: skip

PublishedSplits = Literal["keep", "ignore"]

# The words by which Hugging Face's data sets name a split, in files, folders and columns.
_SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class SourceOptions(FrozenModel):
    """What the configurations of all sources share."""

    def list_scientific(self) -> dict[str, Any]:
        """Return the fields that shape the samples: all but the source's location."""
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
    published: Split | None = None
    """The split that its source puts it in; None where the source does not mention splits."""
    reject: str = ""
    """Why it is not a sample, where that is known before reading it."""
    split: Split = "train"
    """Set by ingestion, from the published splits and the groups' order."""


class Source(Protocol):
    """Where image pairs come from."""

    def digest(self) -> str:
        """Return a digest of the content, wherever it is stored; "" where the configuration determines it."""
        ...

    def plan(self) -> list[SampleKey]:
        """Return every sample in source order, without reading an image."""
        ...

    def read(self, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Yield one pair or reject for each key, in order."""
        ...


def find_split(words: str) -> Split | None:
    """Return the split that a name says, as Hugging Face's data sets say it (``test-00000-of-00002``, ``val``), or None."""
    for word in re.split(r"[^a-z]+", words.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def load_picture(data: bytes, image_size: int | None, white: int = WHITE_16_BIT) -> bytes:
    """Return an image file as PNG of (image_size, image_size); ValueError with the reason where that cannot be done.

    None leaves the file as it is: an annotator decodes it at its own resolution. ``white`` as ``decode_image`` takes it.
    """
    if image_size is None:
        return data if white == WHITE_16_BIT else encode_png(decode_image(data, white))
    return encode_png(resize_image(decode_image(data, white), image_size))


def locate(root: str, name: str) -> str:
    """Return the location of a source's file; ValueError for an address, and for a name that leads out of a bucket.

    A local ``..`` is resolved by the operating system, through links; elsewhere by names alone.
    """
    if "://" in name:
        raise ValueError(f"{name} is an address: names are relative to {root}")
    uri = join_uri(root, name)
    if local_path(uri) is not None or ".." not in name.split("/"):
        return uri
    scheme, _, path = uri.partition("://")
    place = posixpath.normpath(path)
    if place.startswith("..") or "/" not in place:
        raise ValueError(f"{name} leads out of {root}")
    return f"{scheme}://{place}"


def read_file(root: str, name: str) -> bytes:
    """Return a file of a sample; ValueError names it, relative to its source, and says why it cannot be read.

    A store's failure propagates: a lost connection must not become a permanent reject.
    """
    if not is_name(name):
        raise ValueError(f"{name[:40]!a} is no file name: it has {len(name)} letters, or one that no name can have")
    uri = locate(root, name)
    path = local_path(uri)
    try:
        if path is not None and path.exists() and not path.is_file():
            raise ValueError(f"{name} is {'a folder' if path.is_dir() else 'a device or pipe'}, not a file")
        return read_bytes(uri)
    except FileNotFoundError as error:
        raise ValueError(f"{name} is missing{_explain_missing(root, name)}") from error
    except OSError as error:
        if not is_denied(error) and (path is None or error.errno not in _OF_ONE_FILE):
            raise
        raise ValueError(f"{name} cannot be read: {describe_error(error)}") from error


def is_name(name: str) -> bool:
    """Say whether a text can name a file at all."""
    return is_unicode(name) and "\0" not in name and len(name.encode()) <= _NAME_BYTES


def check_captions(texts: Mapping[str, object], needed: Sequence[str]) -> dict[str, str]:
    """Return the texts stripped, "" for an absent one; ValueError names a required one that is missing or not text."""
    read = {name: read_text(name, text) for name, text in texts.items()}
    missing = [name for name in needed if not read[name]]
    if missing:
        raise ValueError(f"the caption is missing: {', '.join(missing)}")
    return read


def read_text(name: str, text: object) -> str:
    """Return a cell's text stripped, "" for None; ValueError where it is not text, or cannot be encoded."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}, not a text")
    stripped = (text or "").strip()
    if not is_unicode(stripped):
        raise ValueError(f"{name} is not Unicode: it has half of a surrogate pair, in {write_safely(stripped)!r}")
    return stripped


def is_unicode(text: str) -> bool:
    """Say whether a text can be encoded: JSON can hold half of a surrogate pair, which no encoding can."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def write_safely(text: str) -> str:
    """Return a text that can be encoded, with lone surrogates replaced by their codes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _explain_missing(root: str, name: str) -> str:
    """Return what is probably wrong with the name of a missing file; "" where nothing stands out."""
    if re.match(r"[A-Za-z]:[\\/]|/", name):
        return f": names are relative to {root}"
    if "\\" in name:
        return ": write / between folders, not \\"
    folder, _, last = name.rpartition("/")
    stem, dot, suffix = last.rpartition(".")
    others = {
        "the file's own name is in another Unicode form (NFD)": unicodedata.normalize("NFD", name),
        "the file's own name is in another Unicode form (NFC)": unicodedata.normalize("NFC", name),
    }
    for ending in (suffix.lower(), suffix.upper()):
        others[f"there is {stem}{dot}{ending}"] = posixpath.join(folder, f"{stem}{dot}{ending}")
    others[f"there is {last.lower()}"] = posixpath.join(folder, last.lower())
    for hint, other in others.items():
        with suppress(OSError, ValueError):
            if other != name and exists(locate(root, other)):
                return f": {hint}, so write the name as the file has it"
    return ""
