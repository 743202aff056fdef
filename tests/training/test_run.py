"""What the training process prints: JSON for the launching process, text for a person at a terminal."""

import io

from prompt_diffusion.engine.events import StepEvent, ValidationEvent, describe, describe_losses, parse_event
from prompt_diffusion.training.run import emit

STEP = StepEvent(
    step=1,
    num_steps=2,
    loss=0.5,
    losses={"depth_to_image": 0.25, "hed_to_image": 0.75},
    gradient_norm=1.0,
    learning_rate_factor=1.0,
    num_skipped=0,
    samples_per_second=1.0,
    eta_seconds=1.0,
    device_memory_bytes=1,
    gigaflop_per_sample=None,
    model_flops_per_second=None,
)
VALIDATION = ValidationEvent(step=2, num_steps=2, loss=0.5, is_best=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_one_line_of_json_for_each_event():
    stream = io.StringIO()
    emit(STEP, stream)
    emit(VALIDATION, stream)
    assert [parse_event(line) for line in stream.getvalue().splitlines()] == [STEP, VALIDATION]


def test_a_terminal_gets_the_same_text_as_the_log():
    stream, one_task = Terminal(), STEP.model_copy(update={"losses": {"depth_to_image": 0.5}})
    emit(STEP, stream)
    emit(one_task, stream)
    emit(VALIDATION, stream)
    assert stream.getvalue().splitlines() == [
        describe(STEP),
        describe_losses(STEP.losses),
        describe(one_task),
        describe(VALIDATION),
    ]
