"""How pictures are made where a call does not say: the model's own values, which stay with its ControlNet."""

from dataclasses import dataclass

from prompt_diffusion.model.controlnet import PromptDiffusionControlNet

DEFAULT_NUM_INFERENCE_STEPS = 50
DEFAULT_GUIDANCE_SCALE = 7.5
"""The defaults of a model that was saved without its own."""


@dataclass(frozen=True)
class PipelineDefaults:
    """What a model's pipeline does where a call does not say."""

    num_inference_steps: int = DEFAULT_NUM_INFERENCE_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    image_size: int | None = None
    """Pixels a side that the model was trained at."""


def settle_defaults(
    controlnet: PromptDiffusionControlNet,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    image_size: int | None,
) -> PipelineDefaults:
    """Return the defaults of a pipeline, and let its ControlNet remember them.

    What is None is taken from what the ControlNet remembers, so that ``PromptDiffusionPipeline(**pipeline.components)`` has the
    model's own values: diffusers hands over the parts alone.
    """
    known = getattr(controlnet, "pipeline_defaults", None) or PipelineDefaults()
    settled = PipelineDefaults(
        known.num_inference_steps if num_inference_steps is None else num_inference_steps,
        known.guidance_scale if guidance_scale is None else guidance_scale,
        known.image_size if image_size is None else image_size,
    )
    controlnet.pipeline_defaults = settled
    return settled
