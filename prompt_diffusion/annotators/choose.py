"""Which annotator makes a condition's maps on this machine: the first of the table whose weights are here."""

from importlib import metadata
from pathlib import Path

from prompt_diffusion.annotators.base import AnnotateResources, AnnotatorSpec
from prompt_diffusion.annotators.hub import is_cached
from prompt_diffusion.annotators.table import ANNOTATORS
from prompt_diffusion.annotators.weights import HubFile, PublishedWeights
from prompt_diffusion.store.storage import exists
from prompt_diffusion.store.uris import join_uri


def choose_annotator(name: str, resources: AnnotateResources) -> AnnotatorSpec:
    """Return the annotator of that name or, for a condition's name, the first of its annotators that can run here.

    Where none of them has its weights here, it is the first in the table: building it says how to get them.
    ValueError for a name that is neither.
    """
    if name in ANNOTATORS:
        return ANNOTATORS[name]
    makers = list_makers(name)
    if not makers:
        conditions = dict.fromkeys(spec.condition for spec in ANNOTATORS.values())
        raise ValueError(
            f"nothing makes {name!r} maps: choose a condition ({', '.join(conditions)}) or an annotator "
            f"({', '.join(ANNOTATORS)})"
        )
    return next((spec for spec in makers if can_run(spec, resources)), makers[0])


def list_makers(condition: str) -> list[AnnotatorSpec]:
    """Return the annotators of a condition, in the order of the table."""
    return [spec for spec in ANNOTATORS.values() if spec.condition == condition]


def can_run(spec: AnnotatorSpec, resources: AnnotateResources) -> bool:
    """Say whether an annotator needs no weights, or they are on this machine or in the store's mirror; asks no hub."""
    if spec.weights is None or resources.weights is not None:
        return True
    mirror = resources.weights_mirror
    if mirror is not None and exists(join_uri(mirror, f"{spec.weights.file}.sha256")):
        return True
    return _is_installed(spec.weights)


def _is_installed(weights: PublishedWeights) -> bool:
    """Say whether the package is installed, or the hub's own cache holds the file."""
    source = weights.source
    if isinstance(source, HubFile):
        return is_cached(source.repository, source.path, source.revision)
    try:
        return Path(str(metadata.distribution(source.distribution).locate_file(source.path))).is_file()
    except metadata.PackageNotFoundError:
        return False
