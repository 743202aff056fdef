"""What stage ``train`` is a function of; imports no torch, so that a run can be planned fast."""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from prompt_diffusion.model.references import base_digest
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.vision_tasks import find_vision_task

VERSION = 2
PIPELINE_FOLDER = "pipeline"
IMAGE_TARGET = "image"


class TrainInputs(BaseModel):
    """The sealed manifests that a training reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    pairs: ManifestRef
    """Image pairs."""
    maps: dict[str, ManifestRef]
    """Condition maps, by condition."""
    latents: dict[str, ManifestRef]
    """Latents of the edited side, by target: ``image`` or a condition."""
    text: ManifestRef
    """Text embeddings of the pairs' edited captions."""

    def narrow(self, vision_tasks: Iterable[str]) -> "TrainInputs":
        """Keep what those vision tasks read; ValueError names what is not there."""
        tasks = [find_vision_task(name) for name in vision_tasks]
        maps = sorted({task.condition for task in tasks})
        latents = sorted({task.target_condition or IMAGE_TARGET for task in tasks})
        for kind, wanted, there in (("condition maps", maps, self.maps), ("latents", latents, self.latents)):
            missing = [name for name in wanted if name not in there]
            if missing:
                raise ValueError(f"the vision tasks need {kind} of {', '.join(missing)}; there are {', '.join(there)}")
        return TrainInputs(
            pairs=self.pairs,
            maps={name: self.maps[name] for name in maps},
            latents={name: self.latents[name] for name in latents},
            text=self.text,
        )


def identify_train(config: TrainConfig, inputs: TrainInputs) -> StageIdentity:
    """Return the identity of a training: its recipe, its base, and only those inputs that its vision tasks read."""
    used = inputs.narrow(config.vision_tasks)
    return StageIdentity(
        stage="train",
        version=VERSION,
        config=config.model_dump(mode="json"),
        inputs={
            "base": base_digest(config.base),
            "pairs": used.pairs.fingerprint,
            "text": used.text.fingerprint,
            **{f"maps/{name}": ref.fingerprint for name, ref in used.maps.items()},
            **{f"latents/{name}": ref.fingerprint for name, ref in used.latents.items()},
        },
    )
