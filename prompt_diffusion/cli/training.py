"""Training from the command line: run it, or print beforehand what it would cost."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prompt_diffusion.cli.screen import show_run
from prompt_diffusion.cli.shared import (
    OverridesOption,
    PresetOption,
    StoreOption,
    VerboseOption,
    need_flows,
    parse_overrides,
    say_errors,
)

if TYPE_CHECKING:
    from prompt_diffusion.presets import RunConfig
    from prompt_diffusion.training.forecast import Forecast


@say_errors
def train(
    preset: PresetOption = "demo",
    overrides: OverridesOption = None,
    store: StoreOption = None,
    verbose: VerboseOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost; train nothing.")] = False,
    teraflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="With --dry-run: sustained TFLOP/s of a device, to predict the time."),
    ] = None,
) -> None:
    """Train the model of all vision tasks, running earlier stages as needed; a training that was stopped resumes.

    Example: prompt-diffusion train --preset paper --set train.batch_size=256 --dry-run
    """
    changes = parse_overrides(overrides or [])
    with need_flows():
        from flows.embedded import find_train_identity, train_here
        from flows.run import start_run

    if not dry_run:
        # waiting threads sleep instead of spinning, which costs far more on a shared machine
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        run = start_run(preset, changes, store)
        with show_run(Path("outputs/train.log"), is_verbose=verbose) as terminal:
            ref = train_here(run, Path("outputs/prefect"), terminal)
        print(f"model: {ref.uri}")
        return
    from prompt_diffusion.presets import build_preset
    from prompt_diffusion.training.forecast import forecast_training

    config = build_preset(preset, changes)
    forecast = forecast_training(config.train, config.resources.train, config.ingest.image_size)
    _print_recipe(config)
    try:
        print(f"fingerprint: {find_train_identity(preset, changes, store).fingerprint}")
    except (ValueError, OSError) as error:  # the stages before are not sealed, or cannot be found from here
        print(f"fingerprint: known once the stages before are sealed ({error})")
    _print_forecast(config, forecast, teraflops)


def _print_recipe(config: "RunConfig") -> None:
    """Print every field of the recipe, and the resources that are not at their defaults."""
    print("recipe:")
    for name, value in config.train.model_dump(mode="json").items():
        print(f"  {name}: {value}")
    changed = config.resources.train.model_dump(mode="json", exclude_defaults=True)
    print(f"resources: {'those below, the rest' if changed else 'all'} at their defaults")
    for name, value in changed.items():
        print(f"  {name}: {value}")


def _print_forecast(config: "RunConfig", forecast: "Forecast", teraflops: float | None) -> None:
    from prompt_diffusion.training.forecast import ASSUMED_TERAFLOPS

    resources = config.resources.train
    print(f"base: {forecast.layout}")
    print(
        f"parameters: {forecast.trained_parameters / 1e6:.1f} M trained, {forecast.frozen_parameters / 1e6:.1f} M frozen"
    )
    print(
        f"steps: {forecast.num_steps:,} of {config.train.batch_size} samples, {forecast.num_samples:,} samples in all"
    )
    print(
        f"arithmetic: {forecast.gigaflop_per_sample:.3g} GFLOP per sample (forward and backward, counted on fake tensors)"
    )
    print(f"memory of each process, estimated: {_gigabytes(forecast.memory_bytes)}")
    print(f"  weights: {_gigabytes(forecast.weights_bytes)}")
    print(f"  gradients: {_gigabytes(forecast.gradients_bytes)}")
    print(f"  optimizer: {_gigabytes(forecast.optimizer_bytes)}")
    print(f"  EMA: {_gigabytes(forecast.ema_bytes)}")
    print(f"  low-precision copies of weights: {_gigabytes(forecast.autocast_bytes)}")
    each = _gigabytes(forecast.activations_bytes_per_sample)
    print(f"  activations: {each} per sample, micro-batches of {forecast.micro_batch_size}", end="")
    print("" if resources.device_batch_size else " (the whole share of the batch; halved until it fits into memory)")
    if resources.gradient_checkpointing:
        print("  (less with gradient checkpointing, which this estimate leaves out)")
    print(f"checkpoint: {_gigabytes(forecast.checkpoint_bytes)}")
    rate = teraflops or ASSUMED_TERAFLOPS[config.train.precision]
    seconds = forecast.predict_seconds(rate, resources.num_processes)
    time = f"{seconds / 3600:.3g} hours" if seconds > 3600 else f"{seconds:.3g} seconds"
    source = "as given" if teraflops else f"assumed of an H100 in {config.train.precision}"
    print(f"time: {time}, predicted, not measured: {resources.num_processes} x {rate:g} TFLOP/s sustained ({source})")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
