"""Stage ``pretrain-look-up``: a look-up trained alone, supervised, and sealed with its scores."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prompt_diffusion.building import builds_networks
from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.pretraining.latents import list_picture_inputs, open_pictures
from prompt_diffusion.pretraining.look_up.config import LookUpConfig
from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import ManifestRef, find_sealed, open_manifest
from prompt_diffusion.store.sealing import seal_manifest, write_file, write_folder
from prompt_diffusion.store.stage import Context, Stage
from prompt_diffusion.store.uris import join_uri

if TYPE_CHECKING:
    from prompt_diffusion.engine.distributed import World
    from prompt_diffusion.model.look_up.look_up import LookUp
    from prompt_diffusion.pretraining.look_up.score import TargetScore

logger = logging.getLogger(__name__)

VERSION = 1
LOOK_UP_FOLDER, SCORES_FILE = "look_up", "scores.json"
_SCORED, _SCORED_ON_THE_WAY = 96, 8
_NEEDED = ("depth", "hed", "seg")
"""Maps that E's auxiliary targets and the scores are made of; normals are scored where there are some."""


@dataclass(frozen=True)
class PretrainLookUp(Stage[TrainResources]):
    """The stage: ``look_up/`` (diffusers' layout, float32) and ``scores.json`` (held-out targets on held-out scenes).

    It is trained on the train split, in this process, resumes from checkpoints, and is scored on the validation split.
    """

    config: LookUpConfig
    dataset: Dataset

    @property
    def title(self) -> str:
        """What people call it."""
        return "pretrain look-up"

    def identify(self) -> StageIdentity:
        """Return architecture and recipe, image pairs and every condition map."""
        return StageIdentity(
            stage="pretrain-look-up",
            version=VERSION,
            config=self.config.model_dump(mode="json"),
            inputs=list_picture_inputs(self.dataset, [*self.config.shares, *_NEEDED]),
        )

    def run(self, context: Context[TrainResources]) -> ManifestRef:
        """Train, score, and seal; the context hears every event, and another run of the same stage is waited for."""
        from prompt_diffusion.engine.distributed import join_world
        from prompt_diffusion.engine.ownership import own_stage

        with (
            join_world("cpu", context.resources.threads_per_process, is_alone=True) as world,
            own_stage(self.identity.uri(context.store), world) as check_owner,
        ):
            sealed = find_sealed(self.identity, context.store)  # another run may have ended it while this one waited
            return sealed or self._make(context, world, check_owner)

    def _make(self, context: Context[TrainResources], world: "World", check_owner: Callable[[], None]) -> ManifestRef:
        from prompt_diffusion.pretraining.look_up.samples import SceneSampler
        from prompt_diffusion.pretraining.look_up.score import score_look_up, write_scores
        from prompt_diffusion.pretraining.look_up.train import train_look_up

        identity, store, resources, config = self.identity, context.store, context.resources, self.config
        shown = open_pictures(self.dataset, "train", resources)
        held_out = open_pictures(self.dataset, "validation", resources)
        num_rows, has_normals = len(held_out.captions), "normal" in self.dataset.maps

        def score(look_up: "LookUp", num_scenes: int) -> "dict[str, TargetScore]":
            num_scenes = min(num_scenes, num_rows // 2)
            return score_look_up(look_up, config, held_out.read, num_rows, num_scenes, has_normals=has_normals)

        def validate(look_up: "LookUp") -> float:
            scores = score(look_up, _SCORED_ON_THE_WAY)
            logger.info("RMSE: %s", ", ".join(f"{name} {score.rmse:.3f}" for name, score in scores.items()))
            return float(np.mean([score.rmse for score in scores.values()]))

        look_up = train_look_up(
            config,
            SceneSampler(config, shown.read, len(shown.captions)),
            join_uri(identity.uri(store), "checkpoints"),
            resources,
            world,
            context.report,
            validate,
            check_owner,
        )
        scores = score(look_up, _SCORED)
        check_owner()
        with tempfile.TemporaryDirectory() as folder:
            look_up.save_pretrained(folder, safe_serialization=True)
            files = write_folder(identity, store, LOOK_UP_FOLDER, Path(folder))
        files.append(write_file(identity, store, SCORES_FILE, write_scores(scores)))
        files.append(write_file(identity, store, "config.json", config.model_dump_json(indent=2).encode()))
        return seal_manifest(identity, store, files, counts={"scenes": shown.data.num_rows})


@builds_networks
def load_look_up(look_up: ManifestRef) -> "LookUp":
    """Load a sealed look-up, to be used or to enter a ControlNet."""
    from prompt_diffusion.model.look_up.look_up import LookUp

    with tempfile.TemporaryDirectory() as cache:
        folder = open_manifest(look_up.uri).fetch_folder(LOOK_UP_FOLDER, Path(cache))
        network: LookUp = LookUp.from_pretrained(folder, use_safetensors=True)
    network.eval()
    return network
