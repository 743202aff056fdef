"""The stages as flows ask for them: made where they are missing, or required; each sealed one is only looked up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect import Task
from prefect.task_runners import ThreadPoolTaskRunner

from flows.run import Run, find_models
from flows.workers import start_workers
from prompt_diffusion.annotators.config import EXACT
from prompt_diffusion.evaluation.cells import build_cell_config
from prompt_diffusion.evaluation.config import METHODS, EvalResources
from prompt_diffusion.evaluation.features import resolve_extractor
from prompt_diffusion.evaluation.generate import build_generate_config
from prompt_diffusion.evaluation.trivial import build_trivial_config
from prompt_diffusion.store.manifest import ManifestRef, UnsealedError, find_sealed, is_sealed, open_manifest
from prompt_diffusion.store.records import MadeShard
from prompt_diffusion.training.stage import IMAGE_TARGET, TrainInputs
from tasks.annotate import annotate, annotate_part
from tasks.benchmark import make_benchmark
from tasks.caching import identify_stage
from tasks.evaluate import generate, measure, measure_in_context, measure_trivial
from tasks.ingest import ingest
from tasks.train import encode, encode_text, stop_on_interrupt, train

Stage = Task[..., ManifestRef]


@dataclass(frozen=True)
class Models:
    """Everything that is measured, and what it was trained on."""

    inputs: TrainInputs
    six_task: ManifestRef
    baselines: dict[str, ManifestRef]


@dataclass(frozen=True)
class Measurements:
    """Everything that the table shows."""

    cells: tuple[ManifestRef, ...]
    in_context: ManifestRef
    trivial: ManifestRef


def obtain(run: Run, stage: Stage, **inputs: Any) -> ManifestRef:  # noqa: ANN401 - any task's parameters
    """Return a stage's sealed output: made now where it is missing, or, if the run requires it, UnsealedError."""
    return obtain_all(run, stage, [inputs])[0]


def obtain_all(run: Run, stage: Stage, several: Sequence[Mapping[str, Any]], at_once: int = 1) -> list[ManifestRef]:
    """Return the outputs of one stage for several inputs, in order, `at_once` of them made at the same time."""
    parameters = [{**inputs, "store": run.store} for inputs in several]
    if run.upstream == "require":
        return [require(stage, inputs) for inputs in parameters]
    if at_once == 1:
        return [stage(**inputs) for inputs in parameters]
    pool: ThreadPoolTaskRunner[ManifestRef] = ThreadPoolTaskRunner(max_workers=at_once)
    with pool as runner, stop_on_interrupt():
        futures = [runner.submit(stage, inputs) for inputs in parameters]
        return [future.result() for future in futures]


def make_parts(run: Run, inputs: Mapping[str, Any]) -> list[MadeShard]:
    """Have the workers make an annotation's shards; none where it is sealed, exact, or too small to be shared."""
    fan_out, config = run.config.resources.annotate_fan_out, inputs["config"]
    indices = list(range(len(open_manifest(inputs["pairs"].uri).shards)))
    is_small = len(indices) <= fan_out.shards_per_part
    if config.annotator == EXACT or is_small or is_sealed(identify_stage(annotate, inputs).uri(run.store)):
        return []
    parts = [indices[start : start + fan_out.shards_per_part] for start in indices[:: fan_out.shards_per_part]]
    common = {**inputs, "store": run.store, "devices": fan_out.devices}
    with start_workers(fan_out) as workers:
        futures = [workers.submit(annotate_part, {**common, "indices": part}) for part in parts]
        return [shard for future in futures for shard in future.result()]


def require(stage: Stage, parameters: Mapping[str, Any]) -> ManifestRef:
    """Return a stage's sealed output; UnsealedError names the stage that is not sealed."""
    identity = identify_stage(stage, parameters)
    sealed = find_sealed(identity, parameters["store"])
    if sealed is None:
        uri = identity.uri(parameters["store"])
        raise UnsealedError(f"stage {identity.stage!r} is not sealed: {uri} is missing, and upstream is 'require'")
    return sealed


def obtain_pairs(run: Run) -> ManifestRef:
    """Return the image pairs."""
    return obtain(run, ingest, config=run.config.ingest)


def obtain_maps(run: Run, pairs: ManifestRef) -> dict[str, ManifestRef]:
    """Return the condition maps of the image pairs, by condition; a large annotation is made in parts, by many workers."""
    maps: dict[str, ManifestRef] = {}
    for config in run.config.annotate:
        inputs = {
            "config": config,
            "pairs": pairs,
            "resources": run.config.resources.annotate,
            "ingest": run.config.ingest,
        }
        made = make_parts(run, inputs) if run.upstream == "make" else []
        maps[config.condition] = obtain(run, annotate, **inputs, made=made)
    return maps


def obtain_inputs(run: Run, pairs: ManifestRef, maps: dict[str, ManifestRef]) -> TrainInputs:
    """Return what trainings read: pairs, maps, the latents of both, and the captions' embeddings."""
    images = {IMAGE_TARGET: pairs, **maps}
    common = {"config": run.config.encode, "resources": run.config.resources.encode}
    latents = obtain_all(run, encode, [{**common, "images": ref} for ref in images.values()])
    text = obtain(run, encode_text, **common, pairs=pairs)
    return TrainInputs(pairs=pairs, maps=maps, latents=dict(zip(images, latents, strict=True)), text=text)


def obtain_joint_model(run: Run, inputs: TrainInputs) -> ManifestRef:
    """Return the one model of all the run's vision tasks."""
    return obtain(run, train, config=run.config.train, inputs=inputs, resources=run.config.resources.train)


def obtain_baselines(run: Run, inputs: TrainInputs) -> dict[str, ManifestRef]:
    """Return the CN(FT) baselines, one a vision task."""
    configs, resources = run.config.baseline_trainings(), run.config.resources
    several = [{"config": c, "inputs": inputs, "resources": resources.baselines} for c in configs.values()]
    models = obtain_all(run, train, several, at_once=resources.parallel_baselines)
    return dict(zip(configs, models, strict=True))


def obtain_models(run: Run) -> Models:
    """Return every model, from the image pairs on."""
    run = find_models(run)
    pairs = obtain_pairs(run)
    inputs = obtain_inputs(run, pairs, obtain_maps(run, pairs))
    return Models(inputs, obtain_joint_model(run, inputs), obtain_baselines(run, inputs))


def obtain_measurements(run: Run, models: Models) -> Measurements:
    """Return a cell for each method and vision task, the in-context test and the trivial baselines."""
    config, resources = run.config.evaluate, build_eval_resources(run)
    extractor = resolve_extractor(config.extractor, run.settings.cache_dir)
    shown = {"pairs": models.inputs.pairs, "maps": models.inputs.maps}
    cells = []
    for method in METHODS:
        for vision_task in run.config.train.vision_tasks:
            model = models.six_task if method == "Prompt Diffusion" else models.baselines[vision_task]
            common = {**shown, "model": model, "resources": resources}
            images = obtain(run, generate, config=build_generate_config(config, method, vision_task), **common)
            cell = build_cell_config(method, vision_task, extractor)
            cells.append(obtain(run, measure, config=cell, generations=images, **common))
    in_context = obtain(run, measure_in_context, config=config, model=models.six_task, resources=resources, **shown)
    trivial = obtain(run, measure_trivial, config=build_trivial_config(config), **shown)
    return Measurements(tuple(cells), in_context, trivial)


def obtain_benchmark(run: Run, measured: Measurements, seconds: dict[str, float]) -> ManifestRef:
    """Return the table and report of what was measured."""
    return obtain(run, make_benchmark, **vars(measured), seconds=seconds)


def find_benchmark(run: Run) -> ManifestRef | None:
    """Return the table if it and everything before it is sealed, else None; asks the store alone and needs no server."""
    asked = replace(run, upstream="require")
    try:
        return obtain_benchmark(asked, obtain_measurements(asked, obtain_models(asked)), seconds={})
    except UnsealedError:
        return None


def build_eval_resources(run: Run) -> EvalResources:
    """Return how much of this machine the evaluation takes."""
    resources = run.config.resources
    return EvalResources(
        cache_dir=run.settings.cache_dir,
        batch_size=resources.evaluate_batch_size,
        num_threads=resources.evaluate_threads,
    )
