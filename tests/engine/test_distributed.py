"""Two real processes: gradients are summed in buckets, and a training may change its number of processes."""

import json
import os
from pathlib import Path

import pytest
import torch

from prompt_diffusion.engine import distributed
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import SINGLE_PROCESS, World, join_world
from prompt_diffusion.engine.loop import run_loop
from prompt_diffusion.engine.stopping import Stopped
from tests.engine.objectives import BATCH_SIZE, Parabola, plan_loop, signal_at, train
from tests.sharing import find_free_ports
from tests.warm import WarmProcess


def _reduce_gradients_in_small_buckets(world: World) -> list[list[float]]:
    """All-reduce gradients of 3, 2 and 6 numbers (the latter not contiguous), 5 and 1, where 6 numbers fill a bucket."""
    distributed._BUCKET_BYTES = 6 * 4
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in (3, 2, (2, 3), 4, 5, 1)]
    for number, parameter in enumerate(parameters):
        if number != 3:  # which has none
            values = torch.arange(float(parameter.numel())) + 10 * number + 100 * world.rank
            parameter.grad = values.view(3, 2).T if number == 2 else values
    world.all_reduce_gradients(parameters)
    return [parameter.grad.flatten().tolist() for parameter in parameters if parameter.grad is not None]


def _train_by_two_by_one_by_two(rank: int, folder: str, port: int) -> None:
    """Steps 1 to 3 by two processes, 4 to 6 by one, 7 to 9 by two; a signal to the last process ends the first parts."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = {"asked": []}
    with join_world("cpu", 1) as both:
        result["sums"] = _reduce_gradients_in_small_buckets(both)
        for world, until in ((both, 3), (SINGLE_PROCESS, 6), (both, 9)):
            if rank < world.size:
                objective = Parabola()
                if world.rank == world.size - 1 and until < 9:
                    signal_at(objective, until - 1)
                resources = TrainResources(device_batch_size=3)
                arguments = ({"weight": objective.weight}, plan_loop(folder, 9), resources, world)
                try:
                    result["losses"] = [record["loss"] for record in run_loop(objective, *arguments).history]
                except Stopped:
                    assert until < 9
                result["asked"].append([(indices.start, indices.stop) for indices in objective.asked])
                result["weight"] = objective.weight.tolist()
            both.barrier()
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(result))


def test_two_processes_one_and_two_again_see_one_stream_and_lose_nothing(tmp_path):
    (port,) = find_free_ports()
    ranks = [WarmProcess(_train_by_two_by_one_by_two, rank, str(tmp_path), port) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert [len(part) for part in first["asked"]] == [6, 9, 6]
    assert [len(part) for part in second["asked"]] == [6, 6]
    stream = [i for run in (first, second) for part in run["asked"] for ends in part for i in range(*ends)]
    assert sorted(stream) == list(range(9 * BATCH_SIZE)), "a sample came twice, or never"
    alone = Parabola()
    state = train(tmp_path / "alone", alone, num_steps=9, device_batch_size=3)
    expected = [[0, 1, 2], [10, 11], [20, 22, 24, 21, 23, 25], [40, 41, 42, 43, 44], [50]]
    assert first["sums"] == second["sums"] == [[2 * value + 100 for value in values] for values in expected]
    assert first["weight"] == second["weight"]
    # the same sums in another order, in float32: 6e-8 a rounding, a few roundings in nine steps
    torch.testing.assert_close(torch.tensor(first["weight"]), alone.weight.detach(), rtol=1e-6, atol=1e-6)
    assert first["losses"] == pytest.approx([record["loss"] for record in state.history], rel=1e-6)


def test_the_hardware_is_described_as_it_is():
    event = World(0, 3).describe_hardware()
    assert event.num_processes == 3
    assert event.device.startswith("CPU ")
    assert event.threads_per_process == torch.get_num_threads()
    assert event.memory_gigabytes > 0
