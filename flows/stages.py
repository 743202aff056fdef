"""The stages as flows request them: made if missing, or required; sealed ones are only looked up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from prefect.task_runners import ThreadPoolTaskRunner

from flows.run import Run
from flows.workers import start_workers
from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.config import EXACT
from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.ingest import Ingest
from prompt_diffusion.device import DeviceResources
from prompt_diffusion.evaluation.benchmark import Benchmark
from prompt_diffusion.evaluation.cells import MeasureCell, build_cell_config
from prompt_diffusion.evaluation.config import METHODS, Method
from prompt_diffusion.evaluation.features import resolve_extractor
from prompt_diffusion.evaluation.generate import Generate, GenerateConfig, build_generate_config
from prompt_diffusion.evaluation.in_context import MeasureInContext, build_shown_configs
from prompt_diffusion.evaluation.trivial import MeasureTrivial, build_trivial_config
from prompt_diffusion.presets import FanOut
from prompt_diffusion.store.manifest import ManifestRef, UnsealedError, find_sealed, is_sealed
from prompt_diffusion.store.records import MadeShard
from prompt_diffusion.store.stage import Context, ShardedStage, Stage, require
from prompt_diffusion.training.encode import Encode, EncodeText
from prompt_diffusion.training.inputs import IMAGE_TARGET, TrainInputs
from prompt_diffusion.training.stage import Train
from tasks.stages import plan_part, plan_task
from tasks.train import stop_on_interrupt

R = TypeVar("R")
D = TypeVar("D", bound=DeviceResources)


@dataclass(frozen=True)
class Models:
    """Everything that is measured, and what it was trained on."""

    inputs: TrainInputs
    six_task: ManifestRef
    baselines: dict[str, ManifestRef]
    """By vision task; only the trained ones, if nothing is to be made."""

    def find(self, method: Method, vision_task: str) -> ManifestRef:
        """Return the model of a method for a vision task."""
        return self.six_task if method == "Prompt Diffusion" else self.baselines[vision_task]

    def list_missing(self, run: Run) -> list[str]:
        """Return the names of the vision tasks' missing baselines."""
        return [f"CN(FT) {task}" for task in run.config.train.vision_tasks if task not in self.baselines]


@dataclass(frozen=True)
class Measurements:
    """Everything that the table shows."""

    cells: tuple[ManifestRef, ...]
    in_context: ManifestRef
    trivial: ManifestRef


def obtain(run: Run, stage: Stage[R], resources: R, made: Sequence[MadeShard] = ()) -> ManifestRef:
    """Return a stage's sealed output, made now if it is missing; UnsealedError if the run requires it to exist."""
    if run.upstream == "require":
        return require(stage, run.store)
    return plan_task(stage)(stage, Context(run.store, resources, made=tuple(made)))


def obtain_all(run: Run, stages: Sequence[Stage[R]], resources: R, at_once: int = 1) -> list[ManifestRef]:
    """Return the outputs of several stages, in order, ``at_once`` of them made at the same time."""
    if run.upstream == "require" or at_once == 1:
        return [obtain(run, stage, resources) for stage in stages]
    pool: ThreadPoolTaskRunner[ManifestRef] = ThreadPoolTaskRunner(max_workers=at_once)
    with pool as runner, stop_on_interrupt():
        parameters = [{"stage": stage, "context": Context(run.store, resources)} for stage in stages]
        futures = [runner.submit(plan_task(stage), each) for stage, each in zip(stages, parameters, strict=True)]
        return [future.result() for future in futures]


def obtain_shared(run: Run, stage: ShardedStage[D], resources: D, fan_out: FanOut) -> ManifestRef:
    """Return a stage's output; if it is not sealed and large enough, many workers make its shards."""
    indices = range(stage.count_shards())
    is_small = len(indices) <= fan_out.shards_per_part
    if run.upstream == "require" or is_small or is_sealed(stage.identity.uri(run.store)):
        return obtain(run, stage, resources)
    parts = [list(indices[start : start + fan_out.shards_per_part]) for start in indices[:: fan_out.shards_per_part]]
    common = {"stage": stage, "context": Context(run.store, resources), "devices": fan_out.devices}
    with start_workers(fan_out) as workers:
        futures = [workers.submit(plan_part(stage, part), {**common, "indices": part}) for part in parts]
        made: list[MadeShard] = [shard for future in futures for shard in future.result()]
    return obtain(run, stage, resources, made)


def obtain_pairs(run: Run) -> ManifestRef:
    """Return the image pairs."""
    return obtain(run, Ingest(run.config.ingest), None)


def obtain_dataset(run: Run, pairs: ManifestRef) -> Dataset:
    """Return the image pairs with their condition maps; a large annotation is made in parts, by many workers."""
    resources = run.config.resources
    maps: dict[str, ManifestRef] = {}
    for config in run.config.annotate:
        stage = Annotate(config, pairs, run.config.ingest)
        if config.annotator == EXACT:  # the pairs hold them: they are only copied
            maps[config.condition] = obtain(run, stage, resources.annotate)
        else:
            maps[config.condition] = obtain_shared(run, stage, resources.annotate, resources.annotate_fan_out)
    return Dataset(pairs=pairs, maps=maps)


def obtain_inputs(run: Run, dataset: Dataset) -> TrainInputs:
    """Return what trainings read: a dataset, the latents of its images and maps, and the captions' embeddings."""
    config, resources = run.config.encode, run.config.resources.encode
    images = {IMAGE_TARGET: dataset.pairs, **dataset.maps}
    latents = obtain_all(run, [Encode(config, ref) for ref in images.values()], resources)
    text = obtain(run, EncodeText(config, dataset.pairs), resources)
    return TrainInputs(
        pairs=dataset.pairs, maps=dataset.maps, latents=dict(zip(images, latents, strict=True)), text=text
    )


def obtain_joint_model(run: Run, inputs: TrainInputs) -> ManifestRef:
    """Return the one model of all the run's vision tasks."""
    return obtain(run, Train(run.config.train, inputs), run.config.resources.train)


def obtain_baselines(run: Run, inputs: TrainInputs) -> dict[str, ManifestRef]:
    """Return the CN(FT) baselines, one per vision task."""
    configs, resources = run.config.baseline_trainings(), run.config.resources
    stages = [Train(config, inputs) for config in configs.values()]
    models = obtain_all(run, stages, resources.baselines, at_once=resources.parallel_baselines)
    return dict(zip(configs, models, strict=True))


def obtain_models(run: Run) -> Models:
    """Return every model, from the image pairs on."""
    inputs = obtain_inputs(run, obtain_dataset(run, obtain_pairs(run)))
    return Models(inputs, obtain_joint_model(run, inputs), obtain_baselines(run, inputs))


def find_models(run: Run) -> Models:
    """Return the models that exist: the joint one (UnsealedError if it is missing) and the baselines that are trained."""
    inputs = obtain_inputs(run, obtain_dataset(run, obtain_pairs(run)))
    six_task = obtain_joint_model(run, inputs)
    found = {
        task: find_sealed(Train(config, inputs).identity, run.store)
        for task, config in run.config.baseline_trainings().items()
    }
    return Models(inputs, six_task, {task: ref for task, ref in found.items() if ref is not None})


def obtain_generations(run: Run, config: GenerateConfig, model: ManifestRef, dataset: Dataset) -> ManifestRef:
    """Return a model's images; many of them are made in parts, by many workers."""
    resources = run.config.resources
    return obtain_shared(run, Generate(config, model, dataset), resources.evaluate, resources.evaluate_fan_out)


def obtain_measurements(run: Run, models: Models) -> Measurements:
    """Return a cell for each method and vision task that has a model, the in-context test and the trivial baselines."""
    config, resources = run.config.evaluate, run.config.resources.evaluate
    dataset = Dataset(pairs=models.inputs.pairs, maps=models.inputs.maps)
    extractor = resolve_extractor(config.extractor, run.settings.cache_dir)
    cells = []
    for method in METHODS:
        for vision_task in run.config.train.vision_tasks:
            if method != "Prompt Diffusion" and vision_task not in models.baselines:
                continue
            model = models.find(method, vision_task)
            images = obtain_generations(run, build_generate_config(config, method, vision_task), model, dataset)
            cell = MeasureCell(build_cell_config(method, vision_task, extractor), images, model, dataset)
            cells.append(obtain(run, cell, resources))
    shown = {
        name: obtain_generations(run, generated, models.six_task, dataset)
        for name, generated in build_shown_configs(config).items()
    }
    in_context = obtain(run, MeasureInContext(config.split, shown, dataset), None)
    trivial = obtain(run, MeasureTrivial(build_trivial_config(config), dataset), None)
    return Measurements(tuple(cells), in_context, trivial)


def obtain_benchmark(run: Run, measured: Measurements, seconds: dict[str, float]) -> ManifestRef:
    """Return the table and report of what was measured."""
    return obtain(run, Benchmark(measured.cells, measured.in_context, measured.trivial, seconds), None)


def find_benchmark(run: Run) -> ManifestRef | None:
    """Return the table if it and everything before it is sealed, else None; reads only the store and needs no server."""
    asked = run.requiring()
    try:
        return obtain_benchmark(asked, obtain_measurements(asked, obtain_models(asked)), seconds={})
    except UnsealedError:
        return None
