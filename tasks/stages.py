"""Every stage as a Prefect task: one body, and a table of names and time limits for each kind."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from prefect import Task, task

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.data.ingest import Ingest
from prompt_diffusion.device import DeviceResources
from prompt_diffusion.evaluation.benchmark import Benchmark
from prompt_diffusion.evaluation.cells import MeasureCell
from prompt_diffusion.evaluation.generate import Generate
from prompt_diffusion.evaluation.in_context import MeasureInContext
from prompt_diffusion.evaluation.trivial import MeasureTrivial
from prompt_diffusion.pretraining.latents import PretrainLatents
from prompt_diffusion.pretraining.stage import Pretrain, PretrainAutoencoder
from prompt_diffusion.settings import load_settings
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.store.records import MadeShard
from prompt_diffusion.store.stage import Context, Report, ShardedStage, Stage, obtain
from prompt_diffusion.tracking.finishing import finish_run
from prompt_diffusion.training.encode import Encode, EncodeText
from prompt_diffusion.training.stage import Train
from tasks.caching import SealedPolicy
from tasks.progress import log_progress, log_training
from tasks.retries import is_transient
from tasks.train import follow_training

R = TypeVar("R")
D = TypeVar("D", bound=DeviceResources)
DAY_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Plan:
    """How Prefect runs a kind of stage."""

    name: str
    """The task's name on Prefect's page; its runs have their stage's title."""
    timeout_seconds: float | None = DAY_SECONDS
    """Time limit of one try; None for none: Prefect cannot end a task that waits in a thread, as trainings do."""
    items_per_row: int = 1
    """Items that progress counts per row, for example two images for annotations."""
    unit: str = "rows"
    """What the items are called."""


PLANS: dict[type, Plan] = {
    Ingest: Plan("ingest", 7 * DAY_SECONDS),
    Annotate: Plan("annotate", 7 * DAY_SECONDS, items_per_row=2, unit="images"),
    Encode: Plan("encode", 7 * DAY_SECONDS),
    EncodeText: Plan("encode text", 7 * DAY_SECONDS),
    Train: Plan("train", None),
    PretrainAutoencoder: Plan("pretrain autoencoder", None),
    PretrainLatents: Plan("pretrain latents", 7 * DAY_SECONDS, unit="pairs"),
    Pretrain: Plan("pretrain", None),
    Generate: Plan("generate", 7 * DAY_SECONDS, unit="images"),
    MeasureCell: Plan("measure"),
    MeasureInContext: Plan("in-context test"),
    MeasureTrivial: Plan("trivial baselines"),
    Benchmark: Plan("benchmark"),
}


@task(
    cache_policy=SealedPolicy(),
    persist_result=True,
    result_serializer="json",  # Prefect's default is pickle
    retries=3,
    retry_delay_seconds=30,
    retry_condition_fn=is_transient,
)
def make(stage: Stage[R], context: Context[R]) -> ManifestRef:
    """Return the stage's sealed output; make it here if it is not sealed."""
    made = obtain(stage, context, follow)
    if isinstance(stage, Train):
        finish_run(load_settings(), made)  # in case the process that sealed it was killed before doing so
    return made


@task(
    name="part",
    persist_result=False,  # the store knows what was made
    retries=3,
    retry_delay_seconds=30,
    retry_condition_fn=is_transient,
    timeout_seconds=DAY_SECONDS,
)
def make_part(
    stage: ShardedStage[D], context: Context[D], indices: list[int], devices: tuple[str, ...]
) -> list[MadeShard]:
    """Make some shards of a stage, on the first of the devices that no other part in this process uses."""
    with follow(stage, context) as report, borrow_device(devices or (context.resources.device,)) as device:
        return stage.make_part(indices, Context(context.store, context.resources.on(device), report))


def plan_task(stage: Stage[R]) -> "Task[..., ManifestRef]":
    """Return the task that makes this stage, under its names and time limit."""
    plan = PLANS[type(stage)]
    return make.with_options(
        name=plan.name,
        task_run_name=stage.title.replace("{", "(").replace("}", ")"),
        timeout_seconds=plan.timeout_seconds,
    )


def plan_part(stage: ShardedStage[D], indices: Sequence[int]) -> "Task[..., list[MadeShard]]":
    """Return the task that makes some of the stage's shards, under its name."""
    return make_part.with_options(
        name=f"{PLANS[type(stage)].name} part", task_run_name=f"{stage.title}, shards from {indices[0]} on"
    )


def follow(stage: Stage[R], context: Context[R]) -> AbstractContextManager[Report]:
    """Report a stage's progress to the run's log, Prefect's page and, for a training, MLflow."""
    if isinstance(stage, Train):
        return follow_training(stage, context)
    if isinstance(stage, PretrainAutoencoder | Pretrain):
        return _hold(log_training(stage.title))
    plan = PLANS[type(stage)]
    return _hold(log_progress(stage.title, plan.items_per_row, plan.unit))


@contextmanager
def _hold(report: Report) -> Iterator[Report]:
    yield report


_free = threading.Condition()
_taken: set[str] = set()


@contextmanager
def borrow_device(devices: tuple[str, ...]) -> Iterator[str]:
    """Yield a device that is free in this process, waiting until there is one."""
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
