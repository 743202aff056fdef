"""Runs one request on a loaded model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prompt_diffusion.data.transforms import Pixels, decode_image, resize_image
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
    settled = _settle(request, model)
    size = settled.size or pipeline.image_size
    files = _name_files(query, examples)
    pixels = {name: _read(name, data, size) for name, data in files.items()}
    pairs = [(pixels[f"example_{n}_source"], pixels[f"example_{n}_target"]) for n in range(1, len(examples) + 1)]
    options = {
        "example_pair": pairs or None,
        "negative_prompt": settled.negative_prompt,
        "guidance_scale": settled.guidance_scale,
        "num_inference_steps": settled.num_inference_steps,
        "controlnet_conditioning_scale": settled.controlnet_conditioning_scale,
        "generator": torch.Generator().manual_seed(settled.seed),
        "output_type": "uint8",
        "callback_on_step_end": _count_steps(settled, on_step),
    }
    with _use_scheduler(pipeline, settled.scheduler), _say_memory(size):
        if settled.mode == "edit":
            output = pipeline.edit(pixels["query"], settled.prompt, condition=settled.condition, **options)
        else:
            output = pipeline(settled.prompt, query=pixels["query"], **options)
    record = GenerationRecord(
        request=settled,
        model_fingerprint=model.identity.fingerprint,
        images={name: compute_digest(data) for name, data in files.items()},
        versions=_list_versions(),
    )
    condition_map = output.maps[0] if settled.mode == "edit" else None
    return Generation(output.images[0], condition_map, record)


def _settle(request: GenerationRequest, model: OpenModel) -> GenerationRequest:
    """Return the request with the model's own values where it leaves them open."""
    pipeline = model.pipeline
    steps, guidance = request.num_inference_steps, request.guidance_scale
    return request.model_copy(
        update={
            "model": model.identity.name,
            "num_inference_steps": pipeline.default_num_inference_steps if steps is None else steps,
            "guidance_scale": pipeline.default_guidance_scale if guidance is None else guidance,
            "size": request.size or pipeline.image_size,
        }
    )


def _name_files(query: bytes, examples: ImageFiles) -> dict[str, bytes]:
    files = {"query": query}
    for number, (source, target) in enumerate(examples, start=1):
        files |= {f"example_{number}_source": source, f"example_{number}_target": target}
    return files


def _read(name: str, data: bytes, size: int) -> Pixels:
    try:
        return resize_image(decode_image(data), size)
    except ValueError as error:
        raise ValueError(f"{name.replace('_', ' ')}: {error}") from None


def _count_steps(request: GenerationRequest, on_step: OnStep | None) -> Callable[..., dict[str, Any]] | None:
    """Return diffusers' callback, counting over both halves of an edit."""
    if on_step is None:
        return None
    total = (request.num_inference_steps or 0) * (2 if request.mode == "edit" else 1)
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
