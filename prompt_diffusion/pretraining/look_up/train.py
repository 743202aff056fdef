"""The training of a look-up, from scratch or from its newest checkpoint."""

from collections.abc import Callable

import torch

from prompt_diffusion.building import builds_networks
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import OnEvent
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.objective import LoopPlan
from prompt_diffusion.model.look_up.look_up import LookUp
from prompt_diffusion.pretraining.look_up.config import LookUpConfig
from prompt_diffusion.pretraining.look_up.objective import AuxiliaryHead, LookUpObjective
from prompt_diffusion.pretraining.look_up.samples import SceneSampler


@builds_networks
def build_look_up(config: LookUpConfig) -> tuple[LookUp, AuxiliaryHead]:
    """Build a look-up and the head of its auxiliary targets, with fresh weights from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        look_up = LookUp(**config.list_architecture())
        return look_up, AuxiliaryHead(look_up.feature_channels, len(config.class_colors))


def train_look_up(
    config: LookUpConfig,
    sampler: SceneSampler,
    checkpoints: str,
    resources: TrainResources,
    world: World,
    on_event: OnEvent | None = None,
    validate: Callable[[LookUp], float] | None = None,
    check_owner: Callable[[], None] | None = None,
) -> LookUp:
    """Train a look-up from its newest checkpoint.

    ``check_owner`` raises where another run has taken the folder over.
    """
    look_up, head = build_look_up(config)
    parameters = {f"look_up.{name}": p for name, p in look_up.named_parameters()}
    parameters |= {f"auxiliary.{name}": p for name, p in head.named_parameters()}
    run_loop(
        LookUpObjective(config, look_up, head, sampler),
        parameters,
        LoopPlan(config.num_steps, config.batch_size, config.optimizer, checkpoints, check_owner),
        resources,
        world,
        on_event,
        None if validate is None else lambda step: validate(look_up),
    )
    trained: LookUp = look_up.eval().requires_grad_(False)
    return trained
