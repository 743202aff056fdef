"""Write image pairs in the two public forms of InstructPix2Pix, so that any source can be read back through it."""

import io
import json
from collections.abc import Iterable
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from prompt_diffusion.data.records import IMAGE_TYPE, ImagePair, build_schema
from prompt_diffusion.data.transforms import decode_image
from prompt_diffusion.store.storage import write_bytes
from prompt_diffusion.store.uris import join_uri

ROW_SCHEMA = build_schema(
    {
        "original_prompt": pa.string(),
        "original_image": IMAGE_TYPE,
        "edit_prompt": pa.string(),
        "edited_prompt": pa.string(),
        "edited_image": IMAGE_TYPE,
    }
)
_JPEG_QUALITY = 95


def write_instruct_pix2pix_folder(pairs: Iterable[ImagePair], uri: str) -> None:
    """Write the folder form: ``{group}/prompt.json``, two JPEG a pair, and ``seeds.json`` last, in the order of the pairs.

    ValueError for a prompt group whose pairs differ in their texts: the form has one text a group.
    """
    prompts: dict[str, dict[str, str]] = {}
    seeds: dict[str, list[str]] = {}
    for pair in pairs:
        content = {"input": pair.input_prompt, "edit": pair.edit_instruction, "output": pair.edited_prompt}
        if pair.group_id not in prompts:
            prompts[pair.group_id] = content
            write_bytes(join_uri(uri, pair.group_id, "prompt.json"), json.dumps(content).encode())
        elif prompts[pair.group_id] != content:
            raise ValueError(f"prompt group {pair.group_id!r} has two texts: {prompts[pair.group_id]} and {content}")
        for side, image in enumerate((pair.input_image, pair.edited_image)):
            write_bytes(join_uri(uri, pair.group_id, f"{pair.seed}_{side}.jpg"), _encode_jpeg(image))
        seeds.setdefault(pair.group_id, []).append(str(pair.seed))
    write_bytes(join_uri(uri, "seeds.json"), json.dumps(list(seeds.items())).encode())


def write_instruct_pix2pix_parquet(pairs: Iterable[ImagePair], uri: str, rows_per_file: int) -> None:
    """Write the Parquet form, files of at most ``rows_per_file`` rows, with the columns of the hub's data set."""
    if rows_per_file < 1:
        raise ValueError(f"a Parquet file needs at least 1 row, got rows_per_file={rows_per_file}")
    remaining = iter(pairs)
    index = 0
    while block := list(islice(remaining, rows_per_file)):
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist([_build_row(pair) for pair in block], schema=ROW_SCHEMA)
        # A page is at least one write batch, and readers hold whole pages: of 1,024 rows, if it were left to Arrow.
        pq.write_table(table, sink, row_group_size=100, write_batch_size=8, write_page_checksum=True)
        write_bytes(join_uri(uri, "data", f"train-{index:05d}.parquet"), sink.getvalue().to_pybytes())
        index += 1


def _build_row(pair: ImagePair) -> dict[str, Any]:
    return {
        "original_prompt": pair.input_prompt,
        "original_image": {"bytes": pair.input_image, "path": None},
        "edit_prompt": pair.edit_instruction,
        "edited_prompt": pair.edited_prompt,
        "edited_image": {"bytes": pair.edited_image, "path": None},
    }


def _encode_jpeg(image: bytes) -> bytes:
    buffer = io.BytesIO()
    # Full colour resolution: at small sizes the usual halving would smear edges by pixels.
    Image.fromarray(decode_image(image)).save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
