"""What a sealed training records: its recipe, its data, and the licences of everything that went into it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prompt_diffusion.annotators.config import EXACT
from prompt_diffusion.annotators.table import ANNOTATORS
from prompt_diffusion.data.ingest import SOURCE_LICENCES
from prompt_diffusion.model.mirror import MIRROR
from prompt_diffusion.model.references import BASE_LICENCES, DEMO_BASE, HUB_NAME, is_hub_reference
from prompt_diffusion.registry.cache import MODELS
from prompt_diffusion.registry.facts import UNKNOWN, ModelFacts
from prompt_diffusion.store.lineage import list_inputs
from prompt_diffusion.store.manifest import Manifest

REGISTERED_BASE = "a registered model, digest "
CODE_LICENCE = "Apache-2.0"
# Stages whose manifests say something of a training's data.
_PAIRS, _MAPS = "ingest", "annotate"
_SOURCE_LIMITS = {
    "scenes": "Trained on drawn scenes of coloured primitives: of no use for photographs.",
    "photos": "Trained on crops of nine photographs: it knows little else.",
}


def collect_facts(model: Manifest) -> ModelFacts:
    """Return a version's facts about a sealed training; what cannot be found out is "unknown"."""
    config = json.loads(model.read_file("config.json"))  # as it was sealed, whatever fields exist today
    base = name_base(config["base"])
    data = dict(_open_data(model))
    pairs = {role: manifest.identity.config for role, manifest in data.items() if manifest.ref.stage == _PAIRS}
    kinds = {role: config["source"]["kind"] for role, config in pairs.items()}
    sizes = {config["image_size"] for config in pairs.values()}
    limits = [_SOURCE_LIMITS[kind] for kind in dict.fromkeys(kinds.values()) if kind in _SOURCE_LIMITS]
    limits += [f"Trained at {size} x {size} pixels; nothing is known of other sizes." for size in sorted(sizes)]
    return ModelFacts(
        title=_title(config),
        source=f"trained with this project, training {model.ref.fingerprint}",
        base=base,
        vision_tasks=tuple(config["vision_tasks"]),
        licences={"code": CODE_LICENCE, "base": BASE_LICENCES.get(base, UNKNOWN), **_find_licences(model, data, kinds)},
        configuration=model.identity.config,
        datasets=model.identity.digests,
        dataset_notes={"base": base} | {role: _describe(manifest) for role, manifest in data.items()},
        limits=tuple(limits),
    )


def name_base(reference: str) -> str:
    """Return a base's public name, never a folder of this machine."""
    if reference == DEMO_BASE or (is_hub_reference(reference) and HUB_NAME.fullmatch(reference)):
        return reference
    _, mirrored, repository = reference.partition(f"{MIRROR}/")
    if mirrored:
        return repository
    path = Path(reference)
    is_registered = path.parent.name == MODELS and re.fullmatch("[0-9a-f]{64}", path.name) is not None
    return f"{REGISTERED_BASE}{path.name}" if is_registered else "a model from a folder"


def _title(config: Mapping[str, Any]) -> str:
    count = len(config["vision_tasks"])
    what = "ControlNet" if config["method"] == "controlnet" else "Prompt Diffusion"
    tasks = config["vision_tasks"][0].replace("_", " ") if count == 1 else f"{count} vision tasks"
    return f"{what}, {tasks}"


def _open_data(model: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield the sealed image pairs and condition maps that a training read, by role, if its store has them."""
    for ancestor in list_inputs(model):
        if ancestor.manifest is not None and ancestor.input.stage in (_PAIRS, _MAPS):
            yield ancestor.input.role, ancestor.manifest


def _find_licences(model: Manifest, data: dict[str, Manifest], kinds: dict[str, str]) -> dict[str, str]:
    """Return the licences of the images and of the annotators' weights; one that cannot be found is unknown."""
    found: dict[str, str] = {}
    for role, stage in ((each.role, each.stage) for each in model.identity.inputs):
        if stage == _PAIRS:
            name = "dataset" if role == "pairs" else role.removesuffix("/pairs")
            found[name] = SOURCE_LICENCES[kinds[role]] if role in kinds else UNKNOWN
        elif stage == _MAPS:
            annotator = data[role].identity.config["annotator"] if role in data else None
            if annotator == EXACT:
                continue
            spec = None if annotator is None else ANNOTATORS.get(annotator)
            if spec is not None and spec.weights is None:
                continue  # only arithmetic
            licence = UNKNOWN if spec is None or spec.weights is None else spec.weights.licence
            found[f"annotator {annotator or role}"] = licence
    return found


def _describe(manifest: Manifest) -> str:
    """Return a short description of a dataset."""
    config: dict[str, Any] = manifest.identity.config
    rows = f"{manifest.ref.rows:,} rows"
    if manifest.ref.stage == "ingest":
        return f"{config['source']['kind']}, {rows}, {config['image_size']} pixels"
    maker = "the source's own exact maps" if config["annotator"] == EXACT else f"maps by {config['annotator']}"
    return f"{maker}, {rows}"
