"""Stage ``train``: what it is a function of, and how it is run in processes of its own; imports no torch."""

import logging
import shlex
from dataclasses import dataclass
from importlib.util import find_spec

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.events import LaunchEvent
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.model.references import base_digest, controlnet_digest
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput, compute_digest
from prompt_diffusion.store.records import ManifestRef
from prompt_diffusion.store.stage import Context, Stage
from prompt_diffusion.store.storage import write_bytes
from prompt_diffusion.store.uris import join_uri, local_path
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.inputs import TrainInputs
from prompt_diffusion.training.launch import TrainingStoppedError, build_command, run_command
from prompt_diffusion.training.preflight import check_training

logger = logging.getLogger(__name__)

VERSION = 3


class TrainSpec(FrozenModel):
    """All that a training process is given, as one JSON file."""

    config: TrainConfig
    inputs: TrainInputs
    store_root: str
    resources: TrainResources


@dataclass(frozen=True)
class Train(Stage[TrainResources]):
    """The stage: one model, trained in other processes, which resume from the last checkpoint of an earlier run.

    ValueError, in one sentence, for a user's mistake, here or in the training. ``TrainingStoppedError`` says that the run
    stopped and can be resumed. The processes never outlive this one by more than the time of one step and a checkpoint.
    """

    config: TrainConfig
    inputs: TrainInputs

    @property
    def title(self) -> str:
        """The name shown to people: the training's method, and the vision task of one that has a single one."""
        method = {"prompt_diffusion": "Prompt Diffusion", "controlnet": "CN(FT)"}[self.config.method]
        return method if len(self.config.vision_tasks) > 1 else f"{method} {self.config.vision_tasks[0]}"

    def identify(self) -> StageIdentity:
        """Return the recipe, what it starts from, and those inputs that its vision tasks read.

        The base and the ControlNet enter by their content, never by the place or name that they are found under. A recipe
        without augmentation is identified as before there was any.
        """
        config = self.config
        used = [StageInput(role="base", fingerprint=base_digest(config.base))]
        if config.controlnet is not None:
            digest = controlnet_digest(config.controlnet, config.base)
            used.append(StageInput(role="controlnet", fingerprint=digest))
        used += self.inputs.narrow(config.vision_tasks).list_roles()
        unused = () if config.augmentation else ("augmentation",)
        return StageIdentity(
            stage="train",
            version=VERSION,
            config=config.model_dump(mode="json", exclude={"base", "controlnet", *unused}),
            inputs=tuple(used),
        )

    def run(self, context: Context[TrainResources]) -> ManifestRef:
        """Train in a child, through torchrun or on Ray; the context receives the command, the hardware and every step."""
        resources = context.resources
        check_training(self.config, self.inputs, resources)
        if resources.engine == "ray" and find_spec("ray") is None:
            raise ValueError(
                "the engine 'ray' needs the extra 'ray', which is not installed here: install prompt-diffusion[ray]"
            )
        command = build_command(write_spec(self, context.store, resources), resources)
        logger.info("training: %s", shlex.join(command))
        context.report(LaunchEvent(command=shlex.join(command)))
        model = run_command(command, resources, context.report)
        if model is None:
            raise TrainingStoppedError(
                "the training was stopped: run the same command to go on from its last checkpoint"
            )
        return model


def write_spec(stage: Train, store_root: str, resources: TrainResources) -> str:
    """Write what a training process is given into the stage's folder, named by its content; return its URI."""
    folder = local_path(store_root)
    spec = TrainSpec(
        config=stage.config,
        inputs=stage.inputs.narrow(stage.config.vision_tasks),
        store_root=store_root if folder is None else str(folder.resolve()),
        resources=resources,
    )
    content = spec.model_dump_json(indent=2).encode()
    uri = join_uri(stage.identity.uri(spec.store_root), f"run-{compute_digest(content)[:8]}.json")
    write_bytes(uri, content)
    return uri
