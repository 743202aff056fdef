"""The records that every stage exchanges, and their Parquet tables, which Hugging Face ``datasets`` shows as images."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# Parquet calls a list's entries "element", Arrow "item": with Parquet's name a table read back is the table written.
EXACT_MAPS_TYPE = pa.list_(
    pa.field("element", pa.struct([("condition", pa.string()), ("input_map", IMAGE_TYPE), ("edited_map", IMAGE_TYPE)]))
)
ARRAY_SHAPES_KEY = b"array_shapes"


def _describe_type(data_type: pa.DataType) -> Any:  # noqa: ANN401 - JSON
    """Return how Hugging Face ``datasets`` names an Arrow type in a table's metadata."""
    if data_type == IMAGE_TYPE:
        return {"_type": "Image"}
    if pa.types.is_list(data_type):
        return {"feature": _describe_type(data_type.value_type), "_type": "List"}
    if pa.types.is_struct(data_type):
        return {entry.name: _describe_type(entry.type) for entry in data_type}
    return {"dtype": str(data_type), "_type": "Value"}


def build_schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return a schema whose metadata tells Hugging Face ``datasets`` which columns are images."""
    features = {name: _describe_type(data_type) for name, data_type in columns.items()}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.schema([pa.field(name, data_type) for name, data_type in columns.items()], metadata=metadata)


IMAGE_PAIR_SCHEMA = build_schema(
    {
        "sample_id": pa.string(),
        "group_id": pa.string(),
        "seed": pa.int64(),
        "input_prompt": pa.string(),
        "edit_instruction": pa.string(),
        "edited_prompt": pa.string(),
        "input_image": IMAGE_TYPE,
        "edited_image": IMAGE_TYPE,
        "split": pa.string(),
        "source_uri": pa.string(),
        "exact_maps": EXACT_MAPS_TYPE,
    }
)
CONDITION_MAP_SCHEMA = build_schema({"sample_id": pa.string(), "input_map": IMAGE_TYPE, "edited_map": IMAGE_TYPE})
GENERATION_SCHEMA = build_schema(
    {"sample_id": pa.string(), "vision_task": pa.string(), "seed": pa.int64(), "image": IMAGE_TYPE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePair:
    """An image and its edited twin, with the texts of both; the images are PNG bytes of one size."""

    sample_id: str
    """Unique in its source."""
    group_id: str
    """The prompt group: samples of one group share their texts and belong to one split."""
    seed: int
    """Which image of the prompt group."""
    input_prompt: str
    edit_instruction: str
    edited_prompt: str
    input_image: bytes
    edited_image: bytes
    split: Split
    source_uri: str
    """Where the sample came from, relative to its source: whole URIs would tie the bytes to a place."""
    exact_maps: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """Condition -> (map of the input image, map of the edited image), PNG; from sources that know the truth."""


def _wrap_image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def image_pairs_table(pairs: Sequence[ImagePair]) -> pa.Table:
    """Return one row per pair, in IMAGE_PAIR_SCHEMA; no pairs make an empty table."""
    plain = (
        "sample_id",
        "group_id",
        "seed",
        "input_prompt",
        "edit_instruction",
        "edited_prompt",
        "split",
        "source_uri",
    )
    columns: dict[str, list[Any]] = {name: [getattr(pair, name) for pair in pairs] for name in plain}
    columns["input_image"] = [_wrap_image(pair.input_image) for pair in pairs]
    columns["edited_image"] = [_wrap_image(pair.edited_image) for pair in pairs]
    columns["exact_maps"] = [
        [
            {"condition": name, "input_map": _wrap_image(of_input), "edited_map": _wrap_image(of_edited)}
            for name, (of_input, of_edited) in sorted(pair.exact_maps.items())
        ]
        for pair in pairs
    ]
    return pa.table({name: columns[name] for name in IMAGE_PAIR_SCHEMA.names}, schema=IMAGE_PAIR_SCHEMA)


def condition_maps_table(
    sample_ids: Sequence[str], input_maps: Sequence[bytes], edited_maps: Sequence[bytes]
) -> pa.Table:
    """Return one row per sample with the condition maps (PNG) of both images, in CONDITION_MAP_SCHEMA."""
    columns = {
        "sample_id": list(sample_ids),
        "input_map": [_wrap_image(data) for data in input_maps],
        "edited_map": [_wrap_image(data) for data in edited_maps],
    }
    return pa.table(columns, schema=CONDITION_MAP_SCHEMA)


def generations_table(
    sample_ids: Sequence[str], vision_task: str, seeds: Sequence[int], images: Sequence[bytes]
) -> pa.Table:
    """Return one row per generated image (PNG), in GENERATION_SCHEMA."""
    columns = {
        "sample_id": list(sample_ids),
        "vision_task": [vision_task] * len(sample_ids),
        "seed": list(seeds),
        "image": [_wrap_image(data) for data in images],
    }
    return pa.table(columns, schema=GENERATION_SCHEMA)


def arrays_table(columns: Mapping[str, Sequence[str]], arrays: Mapping[str, NDArray[np.float32]]) -> pa.Table:
    """Return one row per sample: text columns, and arrays such as the mean and deviation of a VAE's posterior.

    Arrays are float32 (N, ...); each row holds its little-endian bytes, and the metadata the shape without N.
    """
    content: dict[str, pa.Array] = {name: pa.array(list(texts), pa.string()) for name, texts in columns.items()}
    lengths = {name: len(values) for name, values in [*columns.items(), *arrays.items()]}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns of one table have different lengths: {lengths}")
    shapes = {name: list(values.shape[1:]) for name, values in arrays.items()}
    for name, values in arrays.items():
        row_type = pa.binary(4 * int(np.prod(values.shape[1:])))
        content[name] = pa.array([row.astype("<f4").tobytes() for row in values], row_type)
    return pa.table(content).replace_schema_metadata({ARRAY_SHAPES_KEY: json.dumps(shapes, sort_keys=True).encode()})


def read_array(table: pa.Table, name: str) -> NDArray[np.float32]:
    """Return an array, float32 (N, ...), from a table that ``arrays_table`` made; ValueError lists its columns."""
    shapes = json.loads((table.schema.metadata or {}).get(ARRAY_SHAPES_KEY, b"{}"))
    if name not in shapes:
        raise ValueError(f"no array {name!r}: there are {', '.join(sorted(shapes)) or 'none'}")
    data = b"".join(table.column(name).to_pylist())
    return np.frombuffer(data, "<f4").reshape(table.num_rows, *shapes[name])
