"""Editing a picture: by a text, in the published two steps, or by an example."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusers.utils import BaseOutput

from prompt_diffusion.model.conditions import ExamplePairs, list_pairs
from prompt_diffusion.model.images import Images, OutputType, check_output_type, convert_pixels
from prompt_diffusion.vision_tasks import find_vision_task

if TYPE_CHECKING:
    from prompt_diffusion.model.pipeline import PromptDiffusionOutput


class EditingOutput(BaseOutput):  # type: ignore[misc]
    """What an edit by text returns."""

    images: Any
    """The edited pictures."""
    maps: Any
    """The condition maps that came between, one a picture that was given; uint8 arrays where the pictures are latents."""


class EditingMixin:
    """The edits of a pipeline, each made of its plain calls."""

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **options: Any) -> "PromptDiffusionOutput":  # noqa: ANN401
            """Do to each query what its example pair shows."""

    def edit(
        self,
        image: Images,
        prompt: str | Sequence[str],
        *,
        condition: str = "depth",
        example_pair: ExamplePairs = None,
        map_guidance_scale: float | None = None,
        map_num_inference_steps: int | None = None,
        output_type: OutputType = "pil",
        **options: Any,  # noqa: ANN401 - a plain call's
    ) -> EditingOutput:
        """Make a picture anew that keeps its layout: image to condition map, then map to image with a new caption.

        Args:
            image: The pictures to edit.
            prompt: What the new ones show.
            condition: What is kept of the pictures: ``depth``, ``hed``, ``seg``, or another that the model was trained on.
            example_pair: (picture, its map), or a list of them: shown so in the first step and reversed in the second. None
                leaves it to the text alone ("depth map") which map is made.
            map_guidance_scale: Guidance weight of the first step; None takes that of the second.
            map_num_inference_steps: Denoising steps of the first step; None takes those of the second.
            output_type: As of a plain call, for pictures and maps.
            options: Further arguments of a plain call; of a list of generators each draws both steps of its image.

        Raises:
            ValueError: As a plain call, and for a condition that there is no vision task of.

        Source: arXiv 2305.01115, section 4.3.
        """
        check_output_type(output_type)
        options.pop("return_dict", None)
        task = find_vision_task(f"image_to_{condition}")
        pairs = None if example_pair is None else list_pairs(example_pair)
        own = {"guidance_scale": map_guidance_scale, "num_inference_steps": map_num_inference_steps}
        first = options | {name: value for name, value in own.items() if value is not None}
        num_images = first.pop("num_images_per_prompt", 1)
        if isinstance(first.get("generator"), Sequence):
            first["generator"] = first["generator"][::num_images]
        maps = self(task.text or "", pairs, image, **first, output_type="uint8").images
        reversed_pairs = None if pairs is None else [(shown_map, picture) for picture, shown_map in pairs]
        images = self(prompt, reversed_pairs, maps, **options, output_type=output_type).images
        return EditingOutput(images=images, maps=convert_pixels(maps, output_type))

    def edit_by_example(
        self,
        image: Images,
        before: Images,
        after: Images,
        prompt: str | Sequence[str] = "",
        **options: Any,  # noqa: ANN401 - a plain call's
    ) -> "PromptDiffusionOutput":
        """Do to pictures what was done between ``before`` and ``after``: a plain call with that example pair."""
        return self(prompt, (before, after), image, **options)
