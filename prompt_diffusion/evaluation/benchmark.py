"""Stage "benchmark": the table and the report of sealed cells, as report.html, table.md, table.csv and table.json.

`table.json` holds a time stamp and the seconds of the run, so two runs would not write the same bytes. Therefore the
first one to write it wins, and everything else is rendered from what lies in the store: a run that was killed, or a
second one beside it, ends with the same files.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from prompt_diffusion.evaluation.in_context import read_in_context
from prompt_diffusion.evaluation.provenance import CellSources, describe_provenance, trace_cell
from prompt_diffusion.evaluation.report import render_report
from prompt_diffusion.evaluation.table import STAGE, TABLE_FILE, BenchmarkTable, render_csv, render_markdown
from prompt_diffusion.evaluation.trivial import read_trivial
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import (
    ManifestRef,
    describe_file,
    find_sealed,
    open_manifest,
    seal_manifest,
    write_file,
)
from prompt_diffusion.store.storage import create_bytes, join_uri, read_bytes

logger = logging.getLogger(__name__)

VERSION: Final = 1
REPORT_FILE: Final = "report.html"


def identify_benchmark(cells: Sequence[ManifestRef], in_context: ManifestRef, trivial: ManifestRef) -> StageIdentity:
    """Return what a benchmark is a function of; ValueError where two cells claim one place of the table."""
    inputs: dict[str, str] = {}
    for cell in cells:
        config = open_manifest(cell.uri).identity.config
        role = f"cell:{config['method']}:{config['vision_task']}"
        if role in inputs:
            raise ValueError(f"two cells stand for {role}: {inputs[role]} and {cell.fingerprint}")
        inputs[role] = cell.fingerprint
    if not inputs:
        raise ValueError("a benchmark needs at least one cell, and got none")
    inputs |= {"in_context": in_context.fingerprint, "trivial": trivial.fingerprint}
    return StageIdentity(stage=STAGE, version=VERSION, config={}, inputs=inputs)


def run_benchmark(
    cells: Sequence[ManifestRef],
    in_context: ManifestRef,
    trivial: ManifestRef,
    store_root: str,
    *,
    seconds: Mapping[str, float],
) -> ManifestRef:
    """Write table and report of sealed cells, and seal them; `seconds` by stage enter the table, not its identity."""
    identity = identify_benchmark(cells, in_context, trivial)
    sealed = find_sealed(identity, store_root)
    if sealed is not None:
        return sealed
    sources = [trace_cell(cell, store_root) for cell in cells]
    _check_pairs(sources)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    in_context_manifest = open_manifest(in_context.uri)
    table = BenchmarkTable(
        cells=[source.result for source in sources],
        trivial=read_trivial(trivial),
        in_context=read_in_context(in_context),
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        provenance=describe_provenance(sources, in_context_manifest, open_manifest(trivial.uri), created),
    )
    table_bytes = _write_once(identity, store_root, json.dumps(table.model_dump(), indent=2).encode())
    table = BenchmarkTable.model_validate_json(table_bytes)
    texts = {
        "table.md": render_markdown(table),
        "table.csv": render_csv(table),
        REPORT_FILE: render_report(table, sources, in_context_manifest, store_root),
    }
    files = [write_file(identity, store_root, path, text.encode()) for path, text in texts.items()]
    files.append(describe_file(TABLE_FILE, table_bytes))
    ref = seal_manifest(identity, store_root, files, counts={"rows": len(table.cells)})
    logger.info("the report is %s", join_uri(ref.uri, REPORT_FILE))
    return ref


def _write_once(identity: StageIdentity, store_root: str, data: bytes) -> bytes:
    """Write the table unless another run did, and return what lies there."""
    uri = join_uri(identity.uri(store_root), TABLE_FILE)
    return data if create_bytes(uri, data) else read_bytes(uri)


def _check_pairs(sources: Sequence[CellSources]) -> None:
    """Raise ValueError where cells were measured on different image pairs: their numbers do not belong in one table."""
    fingerprints = sorted({source.pairs.ref.fingerprint for source in sources})
    if len(fingerprints) > 1:
        raise ValueError(f"the cells were measured on different image pairs: {' and '.join(fingerprints)}")
