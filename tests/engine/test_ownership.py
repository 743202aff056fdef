"""Of two runs of one training one trains, and the other one goes on or hears of the end; nobody writes who was followed."""

import json
import threading
from pathlib import Path

import pytest
import torch

from prompt_diffusion.engine.checkpoint import TrainState, list_checkpoints
from prompt_diffusion.engine.checkpoint_writer import CheckpointWriter
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World, join_world
from prompt_diffusion.engine.ownership import own_stage
from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.store.lease import LeaseLostError
from tests.sharing import PATIENCE_SECONDS


def test_the_second_waits_until_the_first_is_out_and_says_for_whom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    inside: list[str] = []
    second_is_in = threading.Event()

    def enter() -> None:
        with own_stage(str(tmp_path), World()):
            inside.append("second")
            second_is_in.set()

    with own_stage(str(tmp_path), World()) as check_owner:
        second = threading.Thread(target=enter)
        second.start()
        while "another run makes" not in caplog.text:
            second.join(0.01)
        check_owner()
        inside.append("first")
    assert second_is_in.wait(PATIENCE_SECONDS)
    second.join()
    assert inside == ["first", "second"]
    assert "waiting for it" in caplog.text


def test_who_waits_can_be_stopped(tmp_path: Path) -> None:
    world = World()
    world.stop_requested.set()
    with (
        own_stage(str(tmp_path), World()),
        pytest.raises(Stopped, match="another run makes"),
        own_stage(str(tmp_path), world),
    ):
        pytest.fail("it went in")
    assert not world.stop_requested.is_set()


def test_a_run_that_was_followed_drops_and_writes_no_checkpoint(tmp_path: Path) -> None:
    def refuse() -> None:
        raise LeaseLostError("taken over")

    weights = {"weight": torch.nn.Parameter(torch.zeros(2))}
    folder = str(tmp_path / "checkpoints")
    with CheckpointWriter(folder, 10, TrainResources()) as writer:
        writer.save(weights, [], TrainState(step=1), {})
    writer = CheckpointWriter(folder, 10, TrainResources(), refuse)
    writer.save(weights, [], TrainState(step=2), {})
    with pytest.raises(LeaseLostError):
        writer.wait()
    assert list_checkpoints(folder) == ["step-00000001"]


def test_a_lone_process_heeds_no_variables_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "nobody"}.items():
        monkeypatch.setenv(name, value)
    with join_world("cpu", 1, is_alone=True) as world:
        assert (world.rank, world.size) == (0, 1)


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "not JSON", "a list", "another step", "a number changed", "a file gone"]
)
def test_a_damaged_state_falls_back_to_the_checkpoint_before(tmp_path: Path, damage: str) -> None:
    from tests.engine.test_checkpoint import Model

    model, folder = Model(), str(tmp_path)
    with CheckpointWriter(folder, 10, TrainResources()) as writer:
        for step in (1, 2):
            model.save(writer, TrainState(step=step, seconds=12.5))
    newest = tmp_path / "step-00000002"
    state = newest / "state.json"
    text = state.read_text()
    contents = {
        "empty": "",
        "cut": text[: len(text) // 2],
        "not JSON": "\0" * len(text),
        "a list": "[]",
        "another step": (tmp_path / "step-00000001" / "state.json").read_text(),
        "a number changed": text.replace("12.5", "13.5"),
    }
    if damage == "a file gone":
        (newest / "weights.safetensors").unlink()
    else:
        state.write_text(contents[damage])
    assert model.restore(folder).step == 1
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text())["step"] == 1
