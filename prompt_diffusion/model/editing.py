"""Editing a picture: by a text, in the published two steps, or by an example; each is made of plain calls."""

from collections.abc import Callable, Sequence
from typing import Any

from prompt_diffusion.model.conditions import ExamplePairs, list_example_pairs
from prompt_diffusion.model.images import Images, OutputType, check_output_type, convert_pixels
from prompt_diffusion.model.outputs import EditingOutput, PromptDiffusionOutput
from prompt_diffusion.vision_tasks import find_vision_task

Call = Callable[..., PromptDiffusionOutput]
"""A pipeline, as it is called."""


def edit_by_text(
    call: Call,
    image: Images,
    prompt: str | Sequence[str] | None,
    condition: str,
    example_pair: ExamplePairs,
    map_options: dict[str, Any],
    output_type: OutputType,
    options: dict[str, Any],
) -> EditingOutput:
    """Make a picture anew that keeps its layout: image to condition map, then map to image with a new caption.

    ``options`` are further arguments of both calls; those of ``map_options`` that are not None hold in the first alone. What
    describes one of the two texts or one starting noise goes to the second alone.

    Source: arXiv 2305.01115, section 4.3.
    """
    check_output_type(output_type)
    options = {name: value for name, value in options.items() if name != "return_dict"}
    task = find_vision_task(f"image_to_{condition}")
    example_pairs = None if example_pair is None else list_example_pairs(example_pair)
    first = {name: value for name, value in options.items() if name not in ("prompt_embeds", "latents")}
    first |= {name: value for name, value in map_options.items() if value is not None}
    num_images = first.pop("num_images_per_prompt", 1)
    if isinstance(first.get("generator"), Sequence):
        first["generator"] = first["generator"][::num_images]
    maps = call(task.text or "", example_pairs, image, **first, output_type="uint8").images
    reversed_pairs = None if example_pairs is None else [(shown_map, picture) for picture, shown_map in example_pairs]
    images = call(prompt, reversed_pairs, maps, **options, output_type=output_type).images
    return EditingOutput(images=images, maps=convert_pixels(maps, output_type))
