"""The losses of the first 20 steps of the demo's recipe, committed: a change of the numbers must be meant and explained.

To accept new ones: ``python tests/training/test_trajectory.py``, and say in the commit why they moved.
"""

import json
import tempfile
from pathlib import Path

import pytest

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.data.ingest import Ingest
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import Event, StepEvent
from prompt_diffusion.presets import RunConfig, demo, smoke
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.training.encode import Encode, EncodeResources, EncodeText
from prompt_diffusion.training.inputs import TrainInputs
from prompt_diffusion.training.stage import Train
from prompt_diffusion.training.train import run_train

TRAJECTORY = Path(__file__).with_name("trajectory.json")
STEPS, BATCH_SIZE = 20, 8
# Another CPU sums in another order; Muon's steps carry that on, so it grows with the steps.
RELATIVE_TOLERANCE = 2e-3


def compute_trajectory(store: str) -> list[float]:
    """Return the mean loss of each step, on the smoke preset's scenes."""
    config: RunConfig = smoke()
    pairs = obtain(Ingest(config.ingest), Context(store, None))
    maps = {
        each.condition: obtain(Annotate(each, pairs), Context(store, AnnotateResources())) for each in config.annotate
    }
    inputs = TrainInputs(
        pairs=pairs,
        maps=maps,
        latents={
            name: obtain(Encode(config.encode, ref), Context(store, EncodeResources()))
            for name, ref in {"image": pairs, **maps}.items()
        },
        text=obtain(EncodeText(config.encode, pairs), Context(store, EncodeResources())),
    )
    recipe = demo().train.model_copy(update={"batch_size": BATCH_SIZE, "num_steps": STEPS})
    losses: dict[int, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, StepEvent):
            losses[event.step] = event.loss

    resources = TrainResources(log_every_steps=1, device="cpu", device_batch_size=BATCH_SIZE, validate_every_steps=None)
    ref = run_train(Train(recipe, inputs), store, resources, World(), note)
    assert ref is not None
    counts = open_manifest(ref.uri).counts
    assert (counts["skipped_steps"], counts["processes"]) == (0, 1)
    return [losses[step] for step in range(1, STEPS + 1)]


def test_the_demo_takes_the_committed_path(copy_smoke_inputs, tmp_path):
    expected = json.loads(TRAJECTORY.read_text())
    assert compute_trajectory(copy_smoke_inputs(tmp_path / "store")) == pytest.approx(expected, rel=RELATIVE_TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        TRAJECTORY.write_text(json.dumps([round(loss, 6) for loss in compute_trajectory(folder)], indent=1) + "\n")
