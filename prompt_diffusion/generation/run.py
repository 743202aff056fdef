"""Runs one request on a loaded model."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prompt_diffusion.data.transforms import Pixels, check_pair_shape, decode_image, resize_image
from prompt_diffusion.generation.model import OpenModel
from prompt_diffusion.generation.record import GenerationRecord
from prompt_diffusion.generation.request import GenerationRequest, Scheduler
from prompt_diffusion.store.fingerprint import compute_digest

if TYPE_CHECKING:
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

OnStep = Callable[[int, int], None]
"""Told the denoising steps that are done and their number; what it raises ends the run."""
ImageFiles = Sequence[tuple[bytes, bytes]]
"""The files of example pairs: source and target."""

_SCHEDULERS: dict[Scheduler, str] = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request gave."""

    image: Pixels
    """uint8 (size, size, 3)."""
    condition_map: Pixels | None
    """The map in between, for an edit."""
    record: GenerationRecord
    """What is written into the PNG."""
    notes: tuple[str, ...]
    """What the pipeline had to say, such as which words of a text are not read."""


def run_request(
    request: GenerationRequest,
    model: OpenModel,
    query: bytes,
    examples: ImageFiles = (),
    on_step: OnStep | None = None,
) -> Generation:
    """Run one request; the same request, model and images give the same pixels on one machine.

    Args:
        request: The settings.
        model: The model that ``request.model`` names.
        query: The file of the image to transform.
        examples: Example pairs; several are averaged, none stands for a grey pair.
        on_step: Called after each denoising step.

    Raises:
        ValueError: In one sentence, an image that cannot be read, or what the pipeline refuses.
    """
    import torch

    pipeline = model.pipeline
    size = request.size or pipeline.image_size
    steps = request.num_inference_steps or pipeline.default_num_inference_steps
    files = _name_files(query, examples)
    shown, example_pairs = _read_images(files, len(examples), size)
    options: dict[str, Any] = {
        "example_pair": example_pairs or None,
        "negative_prompt": request.negative_prompt,
        "guidance_scale": request.guidance_scale,
        "num_inference_steps": steps,
        "height": size,
        "width": size,
        "controlnet_conditioning_scale": request.controlnet_conditioning_scale,
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "uint8",
        "callback_on_step_end": _count_steps(steps * (2 if request.mode == "edit" else 1), on_step),
    }
    with _use_scheduler(pipeline, request.scheduler), _say_memory(size), _collect_notes() as notes:
        if request.condition is not None:
            output: Any = pipeline.edit(shown, request.prompt, condition=request.condition, **options)
        else:
            output = pipeline(request.prompt, query=shown, **options)
    settled = request.model_copy(
        update={
            "model": model.identity.name,
            "num_inference_steps": steps,
            "guidance_scale": pipeline.guidance_scale,  # the pipeline's own choice depends on the texts
            "size": size,
        }
    )
    record = GenerationRecord(
        request=settled,
        model_fingerprint=model.identity.fingerprint,
        images={name: compute_digest(data) for name, data in files.items()},
        versions=_list_versions(),
    )
    condition_map = output.maps[0] if request.condition is not None else None
    return Generation(output.images[0], condition_map, record, tuple(notes))


def _name_files(query: bytes, examples: ImageFiles) -> dict[str, bytes]:
    files = {"query": query}
    for number, (source, target) in enumerate(examples, start=1):
        files |= {f"example_{number}_source": source, f"example_{number}_target": target}
    return files


def _read_images(files: dict[str, bytes], num_examples: int, size: int) -> tuple[Pixels, list[tuple[Pixels, Pixels]]]:
    """Return the query and the example pairs as squares of that size."""
    decoded = {name: _read(name, data) for name, data in files.items()}
    example_pairs = []
    for number in range(1, num_examples + 1):
        source, target = (decoded[f"example_{number}_{side}"] for side in ("source", "target"))
        check_pair_shape(source, target, f"example {number}")
        example_pairs.append((resize_image(source, size), resize_image(target, size)))
    return resize_image(decoded["query"], size), example_pairs


def _read(name: str, data: bytes) -> Pixels:
    try:
        return decode_image(data)
    except ValueError as error:
        raise ValueError(f"{name.replace('_', ' ')}: {error}") from None


def _count_steps(total: int, on_step: OnStep | None) -> Callable[..., dict[str, Any]] | None:
    """Return diffusers' callback, counting over both halves of an edit."""
    if on_step is None:
        return None
    done = 0

    def tell(pipeline: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        on_step(min(done, total), total)
        return tensors

    return tell


@contextmanager
def _use_scheduler(pipeline: "PromptDiffusionPipeline", name: Scheduler | None) -> Iterator[None]:
    """Let another scheduler, with the model's own noise schedule, take the steps inside the block."""
    own = pipeline.scheduler
    if name is not None:
        import diffusers

        pipeline.scheduler = getattr(diffusers, _SCHEDULERS[name]).from_config(own.config)
    try:
        yield
    finally:
        pipeline.scheduler = own


class _Collector(logging.Handler):
    """Keeps what is logged for whoever asked for the image."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.append(record.getMessage())


@contextmanager
def _collect_notes() -> Iterator[list[str]]:
    """Collect, once each, what the model's package warns of inside the block."""
    notes: list[str] = []
    package, handler = logging.getLogger("prompt_diffusion.model"), _Collector(notes)
    package.addHandler(handler)
    try:
        yield notes
    finally:
        package.removeHandler(handler)
        notes[:] = dict.fromkeys(notes)


@contextmanager
def _say_memory(size: int) -> Iterator[None]:
    """Say in one sentence that the device's memory does not suffice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise ValueError(
            f"the device's memory does not suffice for {size} x {size} pixels: ask for a smaller size, or for the CPU"
        ) from None


def _list_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("prompt-diffusion", "diffusers", "torch")}
