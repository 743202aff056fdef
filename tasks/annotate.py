"""Condition maps of image pairs, as tasks: one a condition, in parts where many workers share it."""

import base64
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prefect import task
from prefect.artifacts import create_markdown_artifact

from prompt_diffusion.annotators.annotate import identify_annotate, make_annotation_shards, run_annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.annotators.sheet import render_maps_sheet
from prompt_diffusion.data.ingest import IngestConfig
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.records import MadeShard
from tasks.caching import DAY_SECONDS, build_stage_options, is_transient
from tasks.progress import log_progress

_free = threading.Condition()
_taken: set[str] = set()


@task(
    name="annotate",
    task_run_name="annotate {config.condition} with {config.annotator}",
    **build_stage_options(identify_annotate, timeout_seconds=7 * DAY_SECONDS),
)
def annotate(
    config: AnnotateConfig,
    pairs: ManifestRef,
    store: str,
    resources: AnnotateResources,
    ingest: IngestConfig,
    made: Sequence[MadeShard] = (),
) -> ManifestRef:
    """Make the condition maps of both images of every pair that no part has made, and seal them all."""
    progress = log_progress(f"{config.condition} maps", items_per_row=2, unit="images")
    return run_annotate(config, pairs, store, resources, ingest, made, on_progress=progress)


@task(
    name="annotate part",
    task_run_name="annotate {config.condition} with {config.annotator}, shards from {indices[0]} on",
    persist_result=False,  # the store knows what was made
    retries=3,
    retry_delay_seconds=30,
    retry_condition_fn=is_transient,
    timeout_seconds=DAY_SECONDS,
)
def annotate_part(
    config: AnnotateConfig,
    pairs: ManifestRef,
    store: str,
    resources: AnnotateResources,
    ingest: IngestConfig,
    indices: list[int],
    devices: tuple[str, ...],
) -> list[MadeShard]:
    """Make some shards of condition maps, on the first of the devices that no other part in this process uses."""
    progress = log_progress(f"{config.condition} maps", items_per_row=2, unit="images")
    with borrow_device(devices) as device:
        here = resources.model_copy(update={"device": device})
        return make_annotation_shards(config, pairs, store, here, indices, ingest, on_progress=progress)


@task(name="publish maps", persist_result=False)
def publish_maps(pairs: ManifestRef, maps: dict[str, ManifestRef]) -> None:
    """Show images beside their maps in Prefect's page (its image artifacts hold addresses only: the picture is inlined)."""
    picture = base64.b64encode(render_maps_sheet(pairs, maps)).decode()
    rows = "\n".join(f"| {name} | {ref.rows} | `{ref.uri}` |" for name, ref in maps.items())
    text = (
        f"| condition | pairs | manifest |\n|---|---|---|\n{rows}\n\n![condition maps](data:image/png;base64,{picture})"
    )
    create_markdown_artifact(text, key="condition-maps", description="The first images and their condition maps.")


@contextmanager
def borrow_device(devices: tuple[str, ...]) -> Iterator[str]:
    """Give one of the devices that is free in this process, and wait for one where none is."""
    with _free:
        _free.wait_for(lambda: not _taken.issuperset(devices))
        device = next(device for device in devices if device not in _taken)
        _taken.add(device)
    try:
        yield device
    finally:
        with _free:
            _taken.remove(device)
            _free.notify_all()
