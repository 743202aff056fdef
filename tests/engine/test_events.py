"""Events: every kind comes through JSON as it was, and is one line of text."""

import json
import math
import subprocess
import sys
from typing import get_args

import pytest
from pydantic import ValidationError

from prompt_diffusion.engine.events import (
    ErrorEvent,
    Event,
    GridEvent,
    HardwareEvent,
    LaunchEvent,
    SealedEvent,
    StepEvent,
    ValidationEvent,
    describe,
    describe_losses,
    parse_event,
)
from prompt_diffusion.store.records import ManifestRef

STEP = StepEvent(
    step=1250,
    num_steps=5000,
    loss=0.12345,
    losses={"depth_to_image": 0.12345, "hed_to_image": 0.2},
    gradient_norm=0.5612,
    learning_rate_factor=1.0,
    num_skipped=0,
    samples_per_second=512.34,
    eta_seconds=7384.2,
    device_memory_bytes=61_200_000_000,
    gigaflop_per_sample=617.6,
    model_flops_per_second=316.4e12,
)
LINES = {
    LaunchEvent(command="python -m it spec.json"): "command: python -m it spec.json",
    HardwareEvent(
        device="NVIDIA H100", num_processes=8, threads_per_process=4, cpu_cores=96, memory_gigabytes=1081.25
    ): "device NVIDIA H100, processes 8, threads per process 4, CPU cores 96, memory 1081.2 GB",
    ValidationEvent(step=500, num_steps=5000, loss=0.25, is_best=True): (
        "step 500 of 5000, validation loss 0.2500, the best so far"
    ),
    ValidationEvent(step=500, num_steps=5000, loss=math.inf, is_best=False): "step 500 of 5000, validation loss inf",
    GridEvent(step=500, num_steps=5000, uri="s3://b/grid.png"): "step 500 of 5000, validation images: s3://b/grid.png",
    SealedEvent(manifest=ManifestRef(uri="s3://b/train/f", stage="train", fingerprint="f", rows=0)): (
        "sealed: s3://b/train/f"
    ),
    ErrorEvent(message="a batch of 6 does not divide"): "error: a batch of 6 does not divide",
}


def test_every_kind_is_tried_here():
    assert {type(event) for event in (*LINES, STEP)} == set(get_args(Event))


@pytest.mark.parametrize("event", [*LINES, STEP], ids=lambda event: event.kind)
def test_an_event_comes_through_json_as_it_was_and_says_its_kind(event):
    line = event.model_dump_json()
    assert "\n" not in line
    assert parse_event(line) == event
    assert json.loads(line)["kind"] == event.kind


@pytest.mark.parametrize(("event", "line"), LINES.items(), ids=lambda value: getattr(value, "kind", ""))
def test_an_event_is_one_line_of_text(event, line):
    assert describe(event) == line


def test_a_diverging_step_comes_through_json_too():
    event = STEP.model_copy(update={"loss": math.nan, "gradient_norm": math.inf, "losses": {"a": -math.inf}})
    found = parse_event(event.model_dump_json())
    assert math.isnan(found.loss)
    assert (found.gradient_norm, found.losses) == (math.inf, {"a": -math.inf})


def test_a_steps_line_fits_a_terminal_and_leaves_out_what_is_not_known():
    full = describe(STEP)
    expected = "step 1250 of 5000, loss 0.1235, grad norm 0.561, 512.3 samples/s, 61.2 GB, 316 TFLOP/s, 2:03:04 left"
    assert full == expected
    assert len(f"Prompt Diffusion [##........] {full}") <= 130
    assert "45 GFLOP/s" in describe(STEP.model_copy(update={"model_flops_per_second": 45.2e9}))
    bare = describe(STEP.model_copy(update={"model_flops_per_second": None, "num_skipped": 2}))
    assert bare == expected.replace("316 TFLOP/s", "2 skipped")


def test_the_losses_line_has_every_vision_task():
    assert describe_losses({"image_to_hed": 0.5, "depth_to_image": 0.2}) == "losses depth→image 0.200, image→hed 0.500"


@pytest.mark.parametrize(
    "line",
    [
        "Downloading shards: 100%",
        "",
        "3",
        '{"step": 1, "loss": 0.5}',
        '{"kind": "elapsed", "seconds": 1}',
        '{"kind": "error"}',
        '{"kind": "error", "message": "m", "code": 1}',
    ],
)
def test_a_line_that_is_not_an_event_is_none(line):
    assert parse_event(line) is None


def test_a_field_that_nobody_knows_is_refused_and_none_can_be_changed():
    with pytest.raises(ValidationError, match="unknown"):
        ErrorEvent(message="m", unknown=1)
    with pytest.raises(ValidationError, match="frozen"):
        STEP.step = 2


def test_listening_needs_no_torch():
    program = "import sys, prompt_diffusion.engine.events; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
