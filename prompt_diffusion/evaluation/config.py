"""What is evaluated, and with what: every field here moves the results, none says where or how fast."""

from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from prompt_diffusion.data.records import Split
from prompt_diffusion.device import DeviceResources
from prompt_diffusion.evaluation.features import ExtractorChoice
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.settings import load_settings
from prompt_diffusion.vision_tasks import Draw, ExamplePolicy

Method = Literal["CN(FT)", "Prompt Diffusion"]
METHODS: Final[tuple[Method, ...]] = ("CN(FT)", "Prompt Diffusion")

PAPER_NEGATIVE_PROMPT: Final = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality"
)


class EvaluateConfig(FrozenModel):
    """How the benchmark is made; the defaults are the published values (arXiv 2305.01115)."""

    num_samples: int = Field(default=10_000, ge=2)
    """Queries of the split for each benchmark cell, the first in order."""
    draw: Draw = "row"
    """What a query is: a row of the split, or a prompt group by one of its rows, drawn at random, as published."""
    num_in_context: int = Field(default=48, ge=1)
    """Queries of the in-context test; each is generated under three example pairs and under none."""
    seed: int = Field(default=0, ge=0)
    """Root of every image's own seed, and of the choice of its example."""
    map_to_image_num_inference_steps: int = Field(default=100, ge=1, le=1000)
    """Sampler steps of map-to-image vision tasks."""
    image_to_map_num_inference_steps: int = Field(default=100, ge=1, le=1000)
    """Sampler steps of image-to-map vision tasks. A map is all but determined by its image: the fewer the steps, the nearer
    the output to the model's mean, and the lower its RMSE."""
    map_to_image_guidance_scale: float = Field(default=9.0, ge=1.0)
    """Guidance weight of map-to-image vision tasks; 1 is no guidance."""
    image_to_map_guidance_scale: float = Field(default=9.0, ge=1.0)
    """Guidance weight of image-to-map vision tasks; 1 is no guidance."""
    example_policy: ExamplePolicy = "same_group"
    """Where the example pair comes from; with the same scene, copying the example's target can beat any model."""
    extractor: ExtractorChoice = "auto"
    """Features of the Frechet distance; "auto" is Inception where its weights are at hand, else EfficientNet-Lite0."""
    prompt_suffix: str = ", best quality, extremely detailed"
    """Appended to every prompt that is not empty."""
    negative_prompt: str = PAPER_NEGATIVE_PROMPT
    """Text of the unconditional branch, which keeps the example pair and the query."""
    split: Split = "test"
    """The split that queries and truths come from."""


class EvaluateResources(DeviceResources):
    """Where and how fast the evaluation runs; nothing of it enters a fingerprint."""

    batch_size: int = Field(default=16, ge=1)
    """Images that are generated at once."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads that PyTorch may use; None leaves its own choice."""
    cache_dir: Path | None = None
    """Folder for local copies of model weights, and of the Inception weights; None takes PROMPT_DIFFUSION_CACHE_DIR's."""

    def find_cache(self) -> Path:
        """Return the folder for local copies."""
        return self.cache_dir or load_settings().cache_dir
