"""Validation of an in-context training: a loss over fixed samples of the validation split, and a grid of images."""

from collections.abc import Mapping

import torch

from prompt_diffusion.engine.events import GridEvent, OnEvent
from prompt_diffusion.model.base import Base
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.store.storage import write_bytes
from prompt_diffusion.store.uris import join_uri
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.grid import render_validation_grid
from prompt_diffusion.training.loss import InContextObjective
from prompt_diffusion.training.rows import TrainingData
from prompt_diffusion.vision_tasks import ExamplePolicy

NUM_SAMPLES = 96
_SAMPLES_AT_ONCE = 8


class InContextValidator:
    """Validates the networks with their present weights: the same samples, timesteps, noise and prompts each time."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        controlnet: PromptDiffusionControlNet,
        data: Mapping[str, TrainingData],
        device: torch.device,
        uri: str,
        on_event: OnEvent | None,
    ) -> None:
        """Take the networks being trained; grids are written below ``uri`` and reported to ``on_event``."""
        if any(len(set(each.rows.group_ids)) == 1 for each in data.values()):
            # there is no other prompt group to take an example from: use the query's own row
            own: dict[ExamplePolicy, float] = {"same_row": 1.0}
            config = config.model_copy(update={"image_to_map_examples": own, "map_to_image_examples": own})
        self.config, self.base, self.controlnet, self.data = config, base, controlnet, data
        self.uri, self.on_event = uri, on_event
        self.objective = InContextObjective(config, base, controlnet, data, device)
        self._grids: dict[int, bytes] = {}

    def __call__(self, step: int) -> float:
        """Return the mean loss of the fixed samples; write the grid and report it."""
        loss = self.compute_loss()
        self._grids = {step: self.render_grid(step)}
        uri = join_uri(self.uri, "validation", f"step-{step:08d}.png")
        write_bytes(uri, self._grids[step])
        if self.on_event is not None:
            self.on_event(GridEvent(step=step, num_steps=self.config.num_steps, uri=uri))
        return loss

    @torch.no_grad()
    def compute_loss(self) -> float:
        """Return the mean loss of the fixed samples."""
        starts = range(0, NUM_SAMPLES, _SAMPLES_AT_ONCE)
        batches = (self.objective.prepare(range(start, start + _SAMPLES_AT_ONCE)) for start in starts)
        return float(torch.cat([self.objective.compute_losses(batch)[0] for batch in batches]).mean())

    def render_grid(self, step: int) -> bytes:
        """Return the grid at a step as PNG, without rendering it again where the last validation was at this step."""
        if step in self._grids:
            return self._grids[step]
        was_training = self.controlnet.training
        pipeline = PromptDiffusionPipeline.from_parts(self.base, self.controlnet.eval())
        try:
            return render_validation_grid(pipeline, {name: each.rows for name, each in self.data.items()}, self.config)
        finally:
            self.controlnet.train(was_training)

    def close(self) -> None:
        """Stop its threads."""
        self.objective.close()
