"""From a sealed cell back to all that it was made from, by the fingerprints in the manifests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prompt_diffusion.evaluation.cells import CellResult, read_cell
from prompt_diffusion.evaluation.features import WEIGHT_DIGESTS
from prompt_diffusion.store.lineage import open_input
from prompt_diffusion.store.manifest import Manifest, ManifestRef, open_manifest


@dataclass(frozen=True, slots=True)
class CellSources:
    """One cell and the sealed manifests behind it."""

    result: CellResult
    cell: Manifest
    generations: Manifest
    model: Manifest
    pairs: Manifest
    maps: Manifest
    """The maps of the vision task's own condition."""
    condition: str


def trace_cell(cell: ManifestRef) -> CellSources:
    """Open all that a cell was made from; UnsealedError names what is no longer in the store."""
    manifest = open_manifest(cell.uri)
    map_role = next(each.role for each in manifest.identity.inputs if each.stage == "annotate")
    maps = open_input(manifest, map_role)
    return CellSources(
        result=read_cell(cell),
        cell=manifest,
        generations=open_input(manifest, "generations"),
        model=open_input(manifest, "model"),
        pairs=open_input(manifest, "pairs"),
        maps=maps,
        condition=maps.identity.config["condition"],
    )


def describe_provenance(
    cells: Sequence[CellSources], in_context: Manifest, trivial: Manifest, created: str
) -> dict[str, Any]:
    """Return when, from which fingerprints, with which configurations and versions a table was made, as JSON values."""
    pairs = cells[0].pairs
    extractors = sorted({c.result.extractor for c in cells if c.result.extractor is not None})
    names = {id(c): f"{c.result.method} / {c.result.vision_task}" for c in cells}
    models = {id(c): c.result.method if _shares_model(c, cells) else names[id(c)] for c in cells}
    return {
        "created": created,
        "data": {**pairs.identity.config, "rows": pairs.ref.rows, "rejects": len(pairs.rejects)},
        "annotate": {c.condition: c.maps.identity.config for c in cells},
        "extractor": {name: WEIGHT_DIGESTS[name] for name in extractors},
        "generate": {names[id(c)]: c.generations.identity.config for c in cells},
        "train": {models[id(c)]: c.model.identity.config for c in cells},
        "fingerprints": {
            "pairs": pairs.ref.fingerprint,
            **{f"maps / {c.condition}": c.maps.ref.fingerprint for c in cells},
            **{f"model / {models[id(c)]}": c.model.ref.fingerprint for c in cells},
            **{f"images / {names[id(c)]}": c.generations.ref.fingerprint for c in cells},
            **{f"cell / {names[id(c)]}": c.cell.ref.fingerprint for c in cells},
            "in_context": in_context.ref.fingerprint,
            "trivial": trivial.ref.fingerprint,
        },
        "versions": cells[0].cell.versions,
    }


def _shares_model(cell: CellSources, cells: Sequence[CellSources]) -> bool:
    """Say whether one model stands behind all cells of the method."""
    fingerprints = {c.model.ref.fingerprint for c in cells if c.result.method == cell.result.method}
    return fingerprints == {cell.model.ref.fingerprint}
