"""Validations: with which weights, when, and which loss is the best."""

import math

import pytest
import torch

from prompt_diffusion.engine.checkpoint import TrainState, list_checkpoints
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import SINGLE_PROCESS
from prompt_diffusion.engine.events import Event, StepEvent, ValidationEvent
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.engine.validation import PeriodicValidation
from tests.engine.objectives import BATCH_SIZE, Parabola, plan_loop, signal_at, train


def validate_with(objective: Parabola, losses: dict[int, float], seen: list[tuple[int, torch.Tensor]]):
    def validate(step: int) -> float:
        seen.append((step, objective.weight.detach().clone()))
        return losses[step]

    return validate


def test_validations_use_the_ema_and_leave_the_training_unchanged(tmp_path):
    plain, validated, losses = Parabola(), Parabola(), {2: 5.0, 4: 3.0, 5: 4.0}
    train(tmp_path / "plain", plain, num_steps=5, ema_decay=0.75)
    seen: list[tuple[int, torch.Tensor]] = []
    events: list[Event] = []
    resources = TrainResources(validate_every_steps=2, log_every_steps=5)
    plan = plan_loop(tmp_path / "validated", 5, ema_decay=0.75)
    validate = validate_with(validated, losses, seen)
    state = run_loop(validated, {"weight": validated.weight}, plan, resources, SINGLE_PROCESS, events.append, validate)
    assert torch.equal(validated.weight, plain.weight)
    assert torch.equal(seen[-1][1], plain.weight), "the last validation is of the model that comes out"
    assert state.validations == [{"step": step, "loss": loss} for step, loss in losses.items()]
    assert [event for event in events if not isinstance(event, StepEvent)] == [
        ValidationEvent(step=step, num_steps=5, loss=loss, is_best=step != 5) for step, loss in losses.items()
    ]
    # far from due by the clock: the best so far are saved, and the last
    assert list_checkpoints(plan.checkpoints) == ["step-00000002", "step-00000004", "step-00000005"]


def test_no_step_is_validated_twice_and_none_is_left_out_by_a_stop(tmp_path):
    losses, events = {2: 1.0, 4: 2.0, 6: 3.0}, []
    resources = TrainResources(validate_every_steps=2, checkpoint_every_seconds=1e-9)
    plan = plan_loop(tmp_path)
    stopped, resumed, again = Parabola(), Parabola(), Parabola()
    seen: list[tuple[int, torch.Tensor]] = []
    signal_at(stopped, 3)
    for objective in (stopped, resumed, again):
        arguments = ({"weight": objective.weight}, plan, resources, SINGLE_PROCESS, events.append)
        validate = validate_with(objective, losses, seen)
        if objective is stopped:
            with pytest.raises(Stopped, match="stopped at step 4 of 6"):
                run_loop(objective, *arguments, validate)
            assert [step for step, _ in seen] == [2], "a validation held up the stop"
        else:
            state = run_loop(objective, *arguments, validate)
    assert [step for step, _ in seen] == [2, 4, 6]
    assert [record["step"] for record in state.validations] == [2, 4, 6]
    assert resumed.asked[0].start == 4 * BATCH_SIZE
    assert again.asked == []


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    losses = iter([math.nan, 3.0, math.inf, 3.0, 2.0])
    state = TrainState()
    resources = TrainResources(validate_every_steps=1)
    validation = PeriodicValidation(lambda step: next(losses), state, plan_loop(tmp_path), resources, None)
    found = []
    for state.step in range(1, 6):
        found.append(validation.run_if_due({}, {}))
    assert found == [False, True, False, False, True]
