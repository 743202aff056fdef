"""What augmented samples need beside the others: a dataset with their family's maps, and an encoder for their targets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from prompt_diffusion.data.augmentation import find_augmentation
from prompt_diffusion.data.dataset import InContextData
from prompt_diffusion.data.transforms import to_model_range
from prompt_diffusion.vision_tasks import VisionTask


class Rows(Protocol):
    """The data that samples are read from."""

    @property
    def rows(self) -> InContextData:
        """Photographs and condition maps."""

    @property
    def latents(self) -> Mapping[str | None, object]:
        """What is encoded, by condition; None: the photographs."""


R = TypeVar("R", bound=Rows)


@dataclass(frozen=True)
class MadeTargets:
    """Targets that an augmentation made, to be encoded on the device."""

    slots: Tensor
    """Their places in the micro-batch, int64 K."""
    images: Tensor
    """uint8 K, H, W, 3."""


def find_rows(data: Mapping[str, R], vision_task: VisionTask, family: str) -> R:
    """Return the data that an augmented sample of a vision task is read from: the task's own where it has the family's maps,
    else the first that has them.

    ``data``: that of each vision task, by its name. ValueError where none has the maps, or the photographs' latents that a
    map-to-image task needs.
    """
    conditions = find_augmentation(family).conditions
    needs_image = vision_task.direction == "map_to_image"
    for each in (data[vision_task.name], *data.values()):
        if conditions <= set(each.rows.maps) and (None in each.latents or not needs_image):
            return each
    raise ValueError(
        f"augmentation {family!r} reads maps of {', '.join(sorted(conditions))} of one dataset, and for {vision_task.name} no "
        "dataset has all of them"
    )


@torch.no_grad()
def encode_made_targets(vae: AutoencoderKL, clean: Tensor, targets: MadeTargets) -> Tensor:
    """Return ``clean``, N, C, h, w, with samples of the made targets' posteriors in their slots, where their noise was."""
    slots = targets.slots.to(clean.device, non_blocking=True)
    images = to_model_range(targets.images.to(clean.device, non_blocking=True))
    posterior, scale = vae.encode(images.to(vae.dtype)).latent_dist, vae.config["scaling_factor"]
    mean, std = (part.to(clean) * scale for part in (posterior.mean, posterior.std))
    return clean.index_copy(0, slots, mean + std * clean[slots])
