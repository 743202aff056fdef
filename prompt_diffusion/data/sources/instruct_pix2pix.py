"""The `instruct_pix2pix` source: the InstructPix2Pix data in both public forms, from any URI, one image at a time.

The folder form: `seeds.json` ([[group, [seed, ...]], ...]), `{group}/prompt.json` (input, edit, output), and
`{group}/{seed}_0.jpg`, `{group}/{seed}_1.jpg`, the image before and after. The other form: Parquet files of rows.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.base import (
    SampleKey,
    Source,
    SourceOptions,
    check_captions,
    digest_listing,
    load_picture,
    read_file,
)
from prompt_diffusion.data.sources.parquet_rows import ParquetRowsSource
from prompt_diffusion.frozen import say_first_error
from prompt_diffusion.store.manifest import Reject
from prompt_diffusion.store.storage import exists, join_uri, list_files, read_bytes

_SEEDS = TypeAdapter(list[tuple[str, list[int | str]]])


class InstructPix2PixConfig(SourceOptions):
    """The InstructPix2Pix data, or any data in one of its two forms."""

    kind: Literal["instruct_pix2pix"] = "instruct_pix2pix"
    uri: str
    """The folder with `seeds.json`, or with Parquet files (a local path, s3://..., hf://datasets/...)."""
    num_groups: int | None = Field(default=None, ge=1)
    """Take the first prompt groups only; None takes all."""


def open_instruct_pix2pix(config: InstructPix2PixConfig, image_size: int | None) -> Source:
    """Return the source of the form that lies there; ValueError where there is neither."""
    if exists(join_uri(config.uri, "seeds.json")):
        return FolderSource(config.uri, config.num_groups, image_size)
    if any(name.endswith(".parquet") for name in list_files(config.uri)):
        return ParquetRowsSource(config.uri, config.num_groups, image_size)
    raise ValueError(f"{config.uri} is no InstructPix2Pix data: it has neither a seeds.json nor a Parquet file")


class FolderSource:
    """The folder form."""

    def __init__(self, uri: str, num_groups: int | None, image_size: int | None) -> None:
        self.uri, self.num_groups, self.image_size = uri, num_groups, image_size

    def digest(self) -> str:
        """Return a digest of `seeds.json` and of the names and sizes of all files."""
        return digest_listing(self.uri, read_bytes(join_uri(self.uri, "seeds.json")))

    def plan(self) -> list[SampleKey]:
        """Return the pairs that `seeds.json` lists; ValueError where it cannot be understood."""
        try:
            groups = _SEEDS.validate_json(read_bytes(join_uri(self.uri, "seeds.json")))
        except ValidationError as error:
            raise ValueError(f"{self.uri}/seeds.json is broken at {say_first_error(error)}") from None
        return [
            SampleKey(f"{group}/{seed}", group, _read_seed(seed), file=group)
            for group, seeds in groups[: self.num_groups]
            for seed in seeds
        ]

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
                    if isinstance(prompts, ValueError):
                        raise prompts
                    yield self._read_pair(key, prompts)
                except ValueError as error:
                    yield Reject(sample_id=key.sample_id, reason=str(error))

    def _read_prompts(self, group: str) -> dict[str, str]:
        """Return input, edit and output of a prompt group; ValueError says what is wrong with them."""
        name = f"{group}/prompt.json"
        try:
            content: Any = json.loads(read_file(join_uri(self.uri, name), name))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{name} holds a {type(content).__name__}, not an object")
        return check_captions(
            {name: content.get(name) for name in ("input", "edit", "output")}, needed=("input", "output")
        )

    def _read_pair(self, key: SampleKey, prompts: dict[str, str]) -> ImagePair:
        """Read both images of a pair; ValueError names the one that is broken."""
        images = []
        for side in (0, 1):
            name = f"{key.sample_id}_{side}.jpg"
            data = read_file(join_uri(self.uri, name), name)
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


def _read_seed(seed: int | str) -> int:
    """Return a seed as a number; ValueError where it is none, since it names files and orders a group."""
    try:
        return int(seed)
    except ValueError as error:
        raise ValueError(f"seeds.json has the seed {seed!r}: a seed is a whole number") from error
