"""What a sealed manifest holds: a summary in words and numbers, and a contact sheet of its images."""

from collections import Counter
from typing import Any

import pyarrow as pa

from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.codec import open_parquet
from prompt_diffusion.store.contact_sheet import Cells, draw_contact_sheet
from prompt_diffusion.store.fingerprint import StageInput
from prompt_diffusion.store.lineage import Ancestor, walk_lineage
from prompt_diffusion.store.manifest import Manifest, Reject, StoredFile, open_manifest

_NUM_EXAMPLES = 5


class RejectSummary(FrozenModel):
    """What was left out, in short."""

    count: int
    """How many samples."""
    reasons: dict[str, int]
    """How many for each reason, the most frequent first."""
    examples: tuple[Reject, ...]
    """The first few."""


class ManifestDescription(FrozenModel):
    """What ``prompt-diffusion manifest`` shows."""

    uri: str
    """The folder."""
    stage: str
    """The stage that made it."""
    version: int
    """The version of the stage's code."""
    fingerprint: str
    """The digest of stage, version, configuration and inputs."""
    config: dict[str, Any]
    """The scientific configuration."""
    inputs: tuple[StageInput, ...]
    """Each input's role, the stage that sealed it, and its fingerprint or digest."""
    lineage: tuple[str, ...]
    """Everything that it was made from, through all stages, one line each: the roles that lead to it, and what it is."""
    counts: dict[str, int]
    """Rows, rejects and what else the stage counted."""
    rejects: RejectSummary
    """What was left out."""
    columns: dict[str, str]
    """Name and type of each column of the shards; empty where there are no shards."""
    files: tuple[StoredFile, ...]
    """Every file with its rows, bytes and digest."""
    versions: dict[str, str]
    """Library versions at the time of sealing."""


def describe_manifest(uri: str) -> ManifestDescription:
    """Describe a sealed folder; UnsealedError and DamagedDataError as ``open_manifest`` raises them."""
    manifest = open_manifest(uri)
    reasons = Counter(reject.reason for reject in manifest.rejects)
    return ManifestDescription(
        uri=uri,
        stage=manifest.identity.stage,
        version=manifest.identity.version,
        fingerprint=manifest.ref.fingerprint,
        config=manifest.identity.config,
        inputs=manifest.identity.inputs,
        lineage=tuple(_describe_ancestor(ancestor) for ancestor in walk_lineage(manifest)),
        counts=manifest.counts,
        rejects=RejectSummary(
            count=len(manifest.rejects), reasons=dict(reasons.most_common()), examples=manifest.rejects[:_NUM_EXAMPLES]
        ),
        columns={field.name: str(field.type) for field in _read_schema(manifest)},
        files=manifest.files,
        versions=manifest.versions,
    )


def _describe_ancestor(ancestor: Ancestor) -> str:
    """Return one line: the roles that lead to it, its stage and fingerprint, and how many rows it has."""
    stage, fingerprint, manifest = ancestor.input.stage, ancestor.input.fingerprint, ancestor.manifest
    what = fingerprint if stage is None else f"{stage}/{fingerprint}"
    rows = f", {manifest.ref.rows:,} rows" if manifest is not None else ""
    gone = " (not in this store)" if stage is not None and manifest is None else ""
    return f"{' < '.join(ancestor.path)}: {what}{rows}{gone}"


def render_contact_sheet(uri: str, max_rows: int = 8) -> bytes:
    """Return a PNG of the first rows: one line per row, one cell per image, the row's texts at the left.

    Image columns are ``struct<bytes, path>``; in a list of structs each element's images get cells of their own.
    ValueError if the manifest has no image column, or a cell is no image.
    """
    if max_rows < 1:
        raise ValueError(f"a contact sheet needs at least one row, got max_rows={max_rows}")
    manifest = open_manifest(uri)
    schema = _read_schema(manifest)
    if not any(_holds_images(field.type) for field in schema):
        columns = ", ".join(schema.names) or "none: it has no shards"
        raise ValueError(f"{uri} has no image column to show; its columns are {columns}")
    rows = _read_rows(manifest, max_rows)
    cells = [_collect_cells(row, schema) for row in rows]
    names = list(dict.fromkeys(name for line in cells for name in line))
    texts = [[str(row[field.name]) for field in schema if _is_text(field.type)] for row in rows]
    title = f"{manifest.identity.stage}  {manifest.ref.fingerprint}  rows 1 to {len(rows)} of {manifest.ref.rows}"
    return draw_contact_sheet(title, names, cells, texts)


def _read_schema(manifest: Manifest) -> pa.Schema:
    """Return the schema of the shards, empty where there are none."""
    if not manifest.shards:
        return pa.schema([])
    data = manifest.read_file(manifest.shards[0].path)
    return open_parquet(data).schema_arrow


def _read_rows(manifest: Manifest, max_rows: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for shard in manifest.shards:
        rows += manifest.read_shard(shard).slice(0, max_rows - len(rows)).to_pylist()
        if len(rows) == max_rows:
            break
    return rows


def _is_image(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) and {field.name for field in kind} == {"bytes", "path"}


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list_of_structs(kind: pa.DataType) -> bool:
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type))


def _holds_images(kind: pa.DataType) -> bool:
    return _is_image(kind) or (_is_list_of_structs(kind) and any(_is_image(field.type) for field in kind.value_type))


def _collect_cells(row: dict[str, Any], schema: pa.Schema) -> Cells:
    """Return the encoded images of a row by the name of their cell; None where a row has none."""
    cells: Cells = {}
    for field in schema:
        value = row[field.name]
        if _is_image(field.type):
            cells[field.name] = value and value["bytes"]
        elif _is_list_of_structs(field.type):
            for position, element in enumerate(value or []):
                words = [str(element[part.name]) for part in field.type.value_type if _is_text(part.type)]
                label = " ".join(words) or str(position)
                for part in field.type.value_type:
                    if _is_image(part.type):
                        image = element[part.name]
                        cells[f"{label} {part.name}"] = image and image["bytes"]
    return cells
