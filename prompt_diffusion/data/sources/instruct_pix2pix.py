"""The ``instruct_pix2pix`` source: the InstructPix2Pix data in both public forms, from any URI, one image at a time.

The folder form: ``seeds.json`` ([[group, [seed, ...]], ...]), ``{group}/prompt.json`` (input, edit, output), and
``{group}/{seed}_0.jpg``, ``{group}/{seed}_1.jpg``, the image before and after. The other form: Parquet files of rows.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.base import (
    PublishedSplits,
    SampleKey,
    Source,
    SourceOptions,
    check_captions,
    load_picture,
    read_file,
    write_safely,
)
from prompt_diffusion.data.sources.digest import digest_files
from prompt_diffusion.data.sources.parquet_rows import ParquetRowsSource, find_parquet_files
from prompt_diffusion.data.sources.tables import decode_text
from prompt_diffusion.frozen import say_first_error
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import exists, read_bytes
from prompt_diffusion.store.uris import join_uri, local_path

_SEEDS = TypeAdapter(list[tuple[str, list[int | str]]])


class InstructPix2PixConfig(SourceOptions):
    """The InstructPix2Pix data, or any data in one of its two forms."""

    kind: Literal["instruct_pix2pix"] = "instruct_pix2pix"
    uri: str
    """The folder with ``seeds.json``, or with Parquet files (a local path, s3://..., hf://datasets/...)."""
    num_groups: int | None = Field(default=None, ge=1)
    """Take the first prompt groups only, of each published split; None takes all."""
    published_splits: PublishedSplits = "keep"
    """What to do where Parquet files name their splits (``test-00000-of-00002.parquet``): keep them, or split all rows anew."""
    columns: dict[str, str] = {}
    """For Parquet files: their names for columns that we name differently, ``{"original_image": "input_image"}``."""


def open_instruct_pix2pix(config: InstructPix2PixConfig, image_size: int | None) -> Source:
    """Return the source of the form found there; ValueError where there is neither."""
    if exists(join_uri(config.uri, "seeds.json")):
        return FolderSource(config.uri, config.num_groups, image_size)
    path = local_path(config.uri)
    if path is not None and path.is_file():
        raise ValueError(f"{config.uri} is a file: name the folder that it lies in")
    if find_parquet_files(config.uri):
        return ParquetRowsSource(config.uri, config.num_groups, image_size, config.published_splits, config.columns)
    if not exists(config.uri):
        raise ValueError(f"there is no folder {config.uri}")
    raise ValueError(f"{config.uri} is no InstructPix2Pix data: it has neither a seeds.json nor a Parquet file")


class FolderSource:
    """The folder form."""

    def __init__(self, uri: str, num_groups: int | None, image_size: int | None) -> None:
        self.uri, self.num_groups, self.image_size = uri, num_groups, image_size

    def digest(self) -> str:
        """Return a digest of ``seeds.json``, and of the texts and images that it names."""
        names = {name for key in self.plan() for name in (f"{key.file}/prompt.json", *_name_images(key))}
        return digest_files(self.uri, names, read_bytes(join_uri(self.uri, "seeds.json")))

    def plan(self) -> list[SampleKey]:
        """Return the pairs that ``seeds.json`` lists; ValueError where it cannot be understood."""
        try:
            groups = _SEEDS.validate_python(json.loads(decode_text(read_bytes(join_uri(self.uri, "seeds.json")))))
        except ValidationError as error:
            raise ValueError(f"{self.uri}/seeds.json is broken at {say_first_error(error)}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.uri}/seeds.json cannot be read: {error}") from error
        keys: list[SampleKey] = []
        entries: dict[str, int] = {}
        for entry, (group, seeds) in enumerate(groups[: self.num_groups], start=1):
            for seed in seeds:
                number, reject = _read_seed(seed), ""
                if not -(2**63) <= number < 2**63:
                    number, reject = 0, f"the seed {seed} is larger than 64 bits hold"
                sample_id = write_safely(f"{group}/{seed}")
                if sample_id in entries:
                    reject = f"it is listed twice in seeds.json: in entry {entries[sample_id]} and in entry {entry}"
                entries.setdefault(sample_id, entry)
                keys.append(SampleKey(sample_id, write_safely(group), number, file=group, reject=reject))
        return keys

    def read(self, keys: Sequence[SampleKey]) -> Iterator[ImagePair | Reject]:
        """Read each pair; what is broken is rejected with its reason."""
        for group, members in groupby(keys, key=lambda key: key.file):
            prompts: dict[str, str] | ValueError
            try:
                prompts = self._read_prompts(group)
            except ValueError as error:
                prompts = error
            for key in members:
                try:
                    if key.reject:
                        raise ValueError(key.reject)
                    if isinstance(prompts, ValueError):
                        raise prompts
                    yield self._read_pair(key, prompts)
                except ValueError as error:
                    yield Reject(sample_id=key.sample_id, reason=write_safely(str(error)))

    def _read_prompts(self, group: str) -> dict[str, str]:
        """Return input, edit and output of a prompt group; ValueError says what is wrong with them."""
        name = f"{group}/prompt.json"
        data = read_file(self.uri, name)
        try:
            content: Any = json.loads(decode_text(data))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{name} holds a {type(content).__name__}, not an object")
        return check_captions(
            {name: content.get(name) for name in ("input", "edit", "output")}, needed=("input", "output")
        )

    def _read_pair(self, key: SampleKey, prompts: dict[str, str]) -> ImagePair:
        """Read both images of a pair; ValueError names the one that is broken."""
        images = []
        for name in _name_images(key):
            data = read_file(self.uri, name)
            try:
                images.append(load_picture(data, self.image_size))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return ImagePair(
            sample_id=key.sample_id,
            group_id=key.group_id,
            seed=key.seed,
            input_prompt=prompts["input"],
            edit_instruction=prompts["edit"],
            edited_prompt=prompts["output"],
            input_image=images[0],
            edited_image=images[1],
            split=key.split,
            source_uri=key.sample_id,
        )


def _name_images(key: SampleKey) -> tuple[str, str]:
    """Return the files of the image before and after."""
    return f"{key.sample_id}_0.jpg", f"{key.sample_id}_1.jpg"


def _read_seed(seed: int | str) -> int:
    """Return a seed as a number; ValueError where it is not one, since it names files and orders a group."""
    try:
        return int(seed)
    except ValueError as error:
        raise ValueError(f"seeds.json has the seed {seed!r}: a seed is a whole number") from error
