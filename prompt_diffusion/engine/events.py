"""What a run reports: one frozen type for each kind of event, JSON between processes, and one line of text for people."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Annotated, Literal, assert_never

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.records import ManifestRef, Progress


class _BaseEvent(FrozenModel, Progress):
    # a diverging run reports losses and norms that are NaN or infinite: they have to survive the trip through JSON
    model_config = ConfigDict(ser_json_inf_nan="constants", allow_inf_nan=True)  # a loss may be NaN, and is reported


class LaunchEvent(_BaseEvent):
    """The training process is about to start."""

    kind: Literal["launch"] = "launch"
    command: str
    """The shell command that starts it, which also works by hand."""


class HardwareEvent(_BaseEvent):
    """What the main process runs on."""

    kind: Literal["hardware"] = "hardware"
    device: str
    """The GPU's name, or the CPU's architecture."""
    num_processes: int
    """Processes of the training."""
    threads_per_process: int
    """CPU threads of each process."""
    cpu_cores: int
    """Cores of the main process's machine."""
    memory_gigabytes: float
    """Main memory of that machine."""


class StepEvent(_BaseEvent):
    """Metrics of one optimizer step, every ``log_every_steps``."""

    kind: Literal["step"] = "step"
    step: int
    """Steps done, this one included."""
    num_steps: int
    """Steps of the whole run."""
    loss: float
    """Mean loss over the batch."""
    losses: dict[str, float]
    """Mean loss of each label (vision task) in the batch."""
    gradient_norm: float
    """Norm over all parameters, before clipping."""
    learning_rate_factor: float
    """What the base learning rates were multiplied by."""
    num_skipped: int
    """Steps skipped so far."""
    samples_per_second: float
    """Over all processes, since the last report."""
    eta_seconds: float
    """Time left at that speed."""
    device_memory_bytes: int
    """Peak memory of the main process: its tensors on a GPU, or its resident memory on a CPU."""
    gigaflop_per_sample: float | None
    """Arithmetic of a sample's forward and backward pass; None where torch cannot count it."""
    model_flops_per_second: float | None
    """Arithmetic over all processes; None where torch cannot count it."""


class ValidationEvent(_BaseEvent):
    """A validation has finished."""

    kind: Literal["validation"] = "validation"
    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole run."""
    loss: float
    """Mean loss over the fixed validation samples."""
    is_best: bool
    """Whether it is the lowest so far."""


class GridEvent(_BaseEvent):
    """A grid of validation images has been written."""

    kind: Literal["grid"] = "grid"
    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole run."""
    uri: str
    """The PNG."""


class SealedEvent(_BaseEvent):
    """The training has finished and its output is sealed: the last event of a run."""

    kind: Literal["sealed"] = "sealed"
    manifest: ManifestRef
    """The output."""


class ErrorEvent(_BaseEvent):
    """The training cannot go on, because of a user's mistake: the last event of a run."""

    kind: Literal["error"] = "error"
    message: str
    """One sentence."""


Event = LaunchEvent | HardwareEvent | StepEvent | ValidationEvent | GridEvent | SealedEvent | ErrorEvent
OnEvent = Callable[[Event], None]
"""Listens to a run."""

_ADAPTER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def parse_event(line: str) -> Event | None:
    """Return the event of a line of JSON; None for any other line, since libraries print to standard output, too."""
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError:
        return None


def describe(event: Event) -> str:
    """Return an event as one line of text: the only rendering, for logs and terminals alike."""
    match event:
        case LaunchEvent():
            return f"command: {event.command}"
        case HardwareEvent():
            return (
                f"device {event.device}, processes {event.num_processes}, threads per process {event.threads_per_process}, "
                f"CPU cores {event.cpu_cores}, memory {event.memory_gigabytes:.1f} GB"
            )
        case StepEvent():
            return _describe_step(event)
        case ValidationEvent():
            best = ", the best so far" if event.is_best else ""
            return f"{_describe_position(event)}, validation loss {event.loss:.4f}{best}"
        case GridEvent():
            return f"{_describe_position(event)}, validation images: {event.uri}"
        case SealedEvent():
            return f"sealed: {event.manifest.uri}"
        case ErrorEvent():
            return f"error: {event.message}"
        case _:
            assert_never(event)


def describe_losses(losses: Mapping[str, float]) -> str:
    """Return the losses of the vision tasks as one line of text."""
    return "losses " + ", ".join(f"{name.replace('_to_', '→')} {loss:.3f}" for name, loss in sorted(losses.items()))


def _describe_step(event: StepEvent) -> str:
    parts = [
        _describe_position(event),
        f"loss {event.loss:.4f}",
        f"grad norm {event.gradient_norm:.3g}",
        f"{event.samples_per_second:.1f} samples/s",
        f"{event.device_memory_bytes / 1e9:.1f} GB",
    ]
    if event.model_flops_per_second is not None:
        parts.append(_format_flops(event.model_flops_per_second))
    if event.num_skipped:
        parts.append(f"{event.num_skipped} skipped")
    return ", ".join([*parts, f"{timedelta(seconds=round(event.eta_seconds))} left"])


def _describe_position(event: StepEvent | ValidationEvent | GridEvent) -> str:
    return f"step {event.step} of {event.num_steps}"


def _format_flops(per_second: float) -> str:
    return f"{per_second / 1e12:.0f} TFLOP/s" if per_second >= 1e13 else f"{per_second / 1e9:.0f} GFLOP/s"
