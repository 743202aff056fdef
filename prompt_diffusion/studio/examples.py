"""Sample images for a newcomer: a few scenes of the project's own source, rendered when the page starts."""

from dataclasses import dataclass
from pathlib import Path

from prompt_diffusion.data.sources.scenes import ScenePair, build_scene_pair
from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.presets import demo
from prompt_diffusion.vision_tasks import VisionTask, find_vision_task

_TASKS = ("image_to_depth", "image_to_hed", "image_to_seg", "depth_to_image", "seg_to_image")
_WORLD = 90_001  # its own seed: none of the scenes that the demo trains on


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row of samples puts into the page: files, text and settings."""

    source: str
    target: str
    query: str
    prompt: str
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True, slots=True)
class EditSample:
    """An image with a new text, and a photograph with its map, or an image with a before and an after."""

    image: str
    prompt: str
    first: str
    second: str
    num_inference_steps: int
    guidance_scale: float


def render_samples(folder: Path) -> list[Sample]:
    """Write the files of one sample per vision task, and return them; the pair and the query show different scenes."""
    samples = []
    for row, name in enumerate(_TASKS):
        task = find_vision_task(name)
        pair, query = (_render(2 * row + offset) for offset in (0, 1))
        evaluate = demo().evaluate
        is_map = task.direction == "image_to_map"
        samples.append(
            Sample(
                source=_write(folder, f"{name}-source", pair, task.source_condition),
                target=_write(folder, f"{name}-target", pair, task.target_condition),
                query=_write(folder, f"{name}-query", query, task.source_condition),
                prompt=_say(task, query),
                num_inference_steps=(
                    evaluate.image_to_map_num_inference_steps if is_map else evaluate.map_to_image_num_inference_steps
                ),
                guidance_scale=evaluate.image_to_map_guidance_scale if is_map else evaluate.map_to_image_guidance_scale,
            )
        )
    return samples


def render_edit_samples(folder: Path) -> list[EditSample]:
    """Write the files of an edit by text, its example a scene and its depth."""
    scene, other = _render(20), _render(21)
    evaluate = demo().evaluate
    return [
        EditSample(
            image=_write(folder, "edit-image", scene, None),
            prompt=scene.edited_prompt,
            first=_write(folder, "edit-photograph", other, None),
            second=_write(folder, "edit-map", other, "depth"),
            num_inference_steps=evaluate.map_to_image_num_inference_steps,
            guidance_scale=evaluate.map_to_image_guidance_scale,
        )
    ]


def _render(index: int) -> ScenePair:
    return build_scene_pair(_WORLD, index, demo().ingest.image_size)


def _say(task: VisionTask, query: ScenePair) -> str:
    return task.text if task.text is not None else query.input_prompt


def _write(folder: Path, name: str, pair: ScenePair, condition: str | None) -> str:
    path = folder / f"{name}.png"
    path.write_bytes(encode_png(pair.input.image if condition is None else pair.input.maps[condition]))
    return str(path)
