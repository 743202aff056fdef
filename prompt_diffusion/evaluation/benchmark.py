"""Stage "benchmark": the table and the report of sealed cells, as report.html, table.md, table.csv and table.json.

``table.json`` holds a time stamp and the seconds of the run, so two runs would not write the same bytes. Therefore the
first one to write it wins, and everything else is rendered from what is in the store: a run that was killed, or a
second one beside it, ends with the same files.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from prompt_diffusion.evaluation.in_context import read_in_context
from prompt_diffusion.evaluation.provenance import CellSources, describe_provenance, trace_cell
from prompt_diffusion.evaluation.report import render_report
from prompt_diffusion.evaluation.table import STAGE, TABLE_FILE, BenchmarkTable, render_csv, render_markdown
from prompt_diffusion.evaluation.trivial import read_trivial
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sealing import describe_file, seal_manifest, write_file
from prompt_diffusion.store.stage import Context, Stage
from prompt_diffusion.store.storage import create_bytes, read_bytes
from prompt_diffusion.store.uris import join_uri

logger = logging.getLogger(__name__)

VERSION: Final = 2
REPORT_FILE: Final = "report.html"


@dataclass(frozen=True)
class Benchmark(Stage[None]):
    """The stage: table and report of sealed cells. ValueError where two cells claim one place of the table."""

    cells: tuple[ManifestRef, ...]
    in_context: ManifestRef
    trivial: ManifestRef
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each stage took, for the table; not part of the identity."""

    @property
    def title(self) -> str:
        """The name shown to people."""
        return "benchmark"

    def identify(self) -> StageIdentity:
        """Return the cells by their place in the table, and the two tests beside them."""
        if not self.cells:
            raise ValueError("a benchmark needs at least one cell, and got none")
        cells = [StageInput.of(_name_place(cell), cell) for cell in self.cells]
        tests = (StageInput.of("in_context", self.in_context), StageInput.of("trivial", self.trivial))
        return StageIdentity(stage=STAGE, version=VERSION, config={}, inputs=(*cells, *tests))

    def run(self, context: Context[None]) -> ManifestRef:
        """Write table and report, and seal them."""
        identity, store = self.identity, context.store
        sources = [trace_cell(cell) for cell in self.cells]
        _check_pairs(sources)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        in_context = open_manifest(self.in_context.uri)
        table = BenchmarkTable(
            cells=[source.result for source in sources],
            trivial=read_trivial(self.trivial),
            in_context=read_in_context(self.in_context),
            seconds={stage: round(value, 3) for stage, value in self.seconds.items()},
            provenance=describe_provenance(sources, in_context, open_manifest(self.trivial.uri), created),
        )
        table_bytes = _write_once(identity, store, json.dumps(table.model_dump(), indent=2).encode())
        table = BenchmarkTable.model_validate_json(table_bytes)
        texts = {
            "table.md": render_markdown(table),
            "table.csv": render_csv(table),
            REPORT_FILE: render_report(table, sources, in_context),
        }
        files = [write_file(identity, store, path, text.encode()) for path, text in texts.items()]
        files.append(describe_file(TABLE_FILE, table_bytes))
        ref = seal_manifest(identity, store, files, counts={"rows": len(table.cells)})
        logger.info("the report is %s", join_uri(ref.uri, REPORT_FILE))
        return ref


def _name_place(cell: ManifestRef) -> str:
    """Return the role of a cell: its method and vision task."""
    config = open_manifest(cell.uri).identity.config
    return f"cells/{config['method']}/{config['vision_task']}"


def _write_once(identity: StageIdentity, store_root: str, data: bytes) -> bytes:
    """Write the table unless another run did, and return the one in the store."""
    uri = join_uri(identity.uri(store_root), TABLE_FILE)
    return data if create_bytes(uri, data) else read_bytes(uri)


def _check_pairs(sources: Sequence[CellSources]) -> None:
    """Raise ValueError where cells were measured on different image pairs: their numbers do not belong in one table."""
    fingerprints = sorted({source.pairs.ref.fingerprint for source in sources})
    if len(fingerprints) > 1:
        raise ValueError(f"the cells were measured on different image pairs: {' and '.join(fingerprints)}")
