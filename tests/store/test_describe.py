"""A manifest's description adds up, and its contact sheet shows the rows' own images."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from prompt_diffusion.store.describe import describe_manifest, render_contact_sheet
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import Reject, UnsealedError
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.store.sharded import run_sharded_stage

IDENTITY = StageIdentity(
    stage="ingest", version=2, config={"image_size": 8}, inputs=(StageInput(role="source", fingerprint="ab"),)
)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MAPS = pa.list_(pa.struct([("condition", pa.string()), ("input_map", IMAGE), ("edited_map", IMAGE)]))
SCHEMA = pa.schema([("sample_id", pa.string()), ("caption", pa.string()), ("photograph", IMAGE), ("maps", MAPS)])

Color = tuple[int, int, int]


def encode_color(color: Color, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def seal_rows(root: str, rows: list[dict[str, Any]], rejects: tuple[Reject, ...] = ()) -> str:
    """Seal the rows in shards of two, all rejects in the first."""
    num_shards = (len(rows) + 1) // 2
    return run_sharded_stage(
        IDENTITY,
        root,
        num_shards,
        lambda index: (
            pa.Table.from_pylist(rows[2 * index : 2 * index + 2], schema=SCHEMA),
            list(rejects) if index == 0 else [],
        ),
        reject_budget=1.0,
    ).uri


def build_row(number: int, color: Color) -> dict[str, Any]:
    return {"sample_id": f"s{number}", "caption": "a plain colour", "photograph": encode_color(color), "maps": []}


def find_colors(png: bytes) -> dict[Color, int]:
    """Return how many pixels of a sheet have each colour."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    colors, counts = np.unique(pixels, axis=0, return_counts=True)
    return {(int(r), int(g), int(b)): int(count) for (r, g, b), count in zip(colors, counts, strict=True)}


def test_description_adds_up(store_root: str) -> None:
    rejects = (
        Reject(sample_id="a", reason="empty"),
        Reject(sample_id="b", reason="truncated"),
        Reject(sample_id="c", reason="truncated"),
    )
    uri = seal_rows(store_root, [build_row(number, (255, 0, 0)) for number in range(3)], rejects)
    description = describe_manifest(uri)
    assert description.stage == "ingest"
    assert description.version == 2
    assert description.fingerprint == IDENTITY.fingerprint
    assert description.config == {"image_size": 8}
    assert description.inputs == (StageInput(role="source", fingerprint="ab"),)
    assert description.lineage == ("source: ab",)
    assert description.counts == {"rows": 3, "rejects": 3}
    assert description.rejects.count == 3
    assert list(description.rejects.reasons.items()) == [("truncated", 2), ("empty", 1)]
    assert description.rejects.examples == rejects
    assert [file.rows for file in description.files] == [2, 1]
    assert list(description.columns) == ["sample_id", "caption", "photograph", "maps"]
    assert type(description).model_validate_json(description.model_dump_json()) == description


def test_folder_without_shards_is_described_and_has_no_sheet(tmp_store: str) -> None:
    ref = seal_manifest(IDENTITY, tmp_store, [write_file(IDENTITY, tmp_store, "a.json", b"{}")], counts={"steps": 1})
    assert describe_manifest(ref.uri).columns == {}
    with pytest.raises(ValueError, match="has no image column to show; its columns are none: it has no shards"):
        render_contact_sheet(ref.uri)


def test_unsealed_folder_is_not_described(tmp_store: str) -> None:
    write_file(IDENTITY, tmp_store, "a.json", b"{}")
    with pytest.raises(UnsealedError):
        describe_manifest(IDENTITY.uri(tmp_store))


def test_sheet_shows_each_row_up_to_the_limit_over_shards(store_root: str) -> None:
    colors: list[Color] = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)]
    uri = seal_rows(store_root, [build_row(number, color) for number, color in enumerate(colors)])
    shown = find_colors(render_contact_sheet(uri, max_rows=3))
    cell = 128 * 128
    assert [shown.get(color, 0) for color in colors] == [cell, cell, cell, 0]
    assert find_colors(render_contact_sheet(uri, max_rows=99))[colors[3]] == cell


def test_sheet_is_the_same_every_time(tmp_store: str) -> None:
    uri = seal_rows(tmp_store, [build_row(0, (1, 2, 3))])
    assert render_contact_sheet(uri) == render_contact_sheet(uri)


def test_images_in_lists_get_cells_and_absent_ones_stay_grey(tmp_store: str) -> None:
    depth = {"condition": "depth", "input_map": encode_color((9, 8, 7)), "edited_map": encode_color((7, 8, 9), (8, 4))}
    rows = [build_row(0, (250, 10, 10)) | {"maps": [depth]}, build_row(1, (10, 250, 10)) | {"photograph": None}]
    shown = find_colors(render_contact_sheet(seal_rows(tmp_store, rows)))
    cell = 128 * 128
    assert shown[9, 8, 7] == cell
    assert shown[7, 8, 9] == cell // 2  # an image twice as wide as high keeps its shape
    assert shown[224, 224, 224] >= 3 * cell + cell // 2  # three absent images, and the rest of the wide one's cell
    assert (10, 250, 10) not in shown


def test_cell_that_is_no_image_is_named(tmp_store: str) -> None:
    rows = [build_row(7, (0, 0, 0)) | {"photograph": {"bytes": b"no image", "path": None}}]
    with pytest.raises(ValueError, match="the column 'photograph' of the row 's7 / a plain colour' cannot be drawn"):
        render_contact_sheet(seal_rows(tmp_store, rows))


def test_sheet_of_no_rows_is_refused(tmp_store: str) -> None:
    with pytest.raises(ValueError, match="max_rows=0"):
        render_contact_sheet(seal_rows(tmp_store, [build_row(0, (0, 0, 0))]), max_rows=0)


@pytest.mark.parametrize("caption", ["", "word", "longer-than-a-line-" * 40, "many words " * 200, "éß 日本"])
def test_any_text_is_drawn(tmp_store: str, caption: str) -> None:
    uri = seal_rows(tmp_store, [build_row(0, (250, 10, 10)) | {"caption": caption}])
    assert find_colors(render_contact_sheet(uri))[250, 10, 10] == 128 * 128
