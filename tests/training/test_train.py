import dataclasses
import io
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import World
from prompt_diffusion.engine.events import GridEvent, HardwareEvent, LaunchEvent, StepEvent, ValidationEvent
from prompt_diffusion.model.base import load_base
from prompt_diffusion.model.load import load_pipeline
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.store.storage import read_bytes
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.loss import InContextObjective
from prompt_diffusion.training.rows import open_training_data
from prompt_diffusion.training.samples import draw_sample
from prompt_diffusion.training.stage import Train, write_spec
from prompt_diffusion.training.train import build_controlnet, run_train, select_parameters
from tests.sharing import find_free_ports
from tests.warm import WarmProcess, run_module


@pytest.fixture(scope="module")
def data(train_inputs, tiny_config):
    return open_training_data(tiny_config, train_inputs, ShardCache(), "train")


def build_objective(config, data):
    base = load_base(config.base)
    controlnet = build_controlnet(config, base)
    parameters = select_parameters(config, base, controlnet)
    return (
        InContextObjective(config, base, controlnet, data, torch.device("cpu")),
        parameters,
        base,
    )


def test_the_loss_of_a_sample_does_not_depend_on_its_micro_batch(tiny_config, data):
    objective, _, _ = build_objective(tiny_config, data)
    with torch.no_grad():
        together, labels = objective.compute_losses(objective.prepare(range(30, 42)))
        apart = [objective.compute_losses(objective.prepare(range(i, i + 1))) for i in range(30, 42)]
    torch.testing.assert_close(together, torch.cat([losses for losses, _ in apart]), rtol=1e-4, atol=1e-6)
    assert labels == [label for _, [label] in apart]
    assert len({round(float(x), 4) for x in together}) == 12


def test_the_frozen_parts_get_no_gradient_and_the_trained_parts_do(tiny_config, data):
    objective, parameters, base = build_objective(tiny_config, data)
    torch.nn.init.normal_(objective.controlnet.query_stem.conv_out.weight)
    torch.nn.init.normal_(objective.controlnet.example_stem.conv_out.weight)
    for block in [*objective.controlnet.trunk.controlnet_down_blocks, objective.controlnet.trunk.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight)
    objective.compute_losses(objective.prepare(range(12)))[0].sum().backward()
    without = [name for name, p in parameters.items() if p.grad is None or not p.grad.abs().sum() > 0]
    # a key's bias adds the same to every score of a softmax: its gradient is zero by mathematics, up to rounding
    assert [name for name in without if "to_k.bias" not in name] == []
    frozen = [p for name, p in base.unet.named_parameters() if f"unet.{name}" not in parameters]
    frozen += [*base.vae.parameters(), *base.text_encoder.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_published_dropout_is_one_uniform_number(data):
    config = TrainConfig(image_to_map_examples={"same_row": 1.0}, map_to_image_examples={"same_row": 1.0})
    draws = [draw_sample(config, data, i) for i in range(8000)]
    no_text, no_pair = np.array([not d.has_text for d in draws]), np.array([not d.has_example for d in draws])
    assert abs(no_text.mean() - 0.10) < 0.012
    assert abs(no_pair.mean() - 0.10) < 0.012
    assert abs((no_text & no_pair).mean() - 0.05) < 0.009


def test_vision_tasks_and_rows_are_drawn_evenly(data, tiny_config):
    draws = [draw_sample(tiny_config, data, i) for i in range(6000)]
    counts = np.unique([d.vision_task.name for d in draws], return_counts=True)[1]
    assert len(counts) == 6
    assert abs(counts / 6000 - 1 / 6).max() < 0.02
    assert np.ptp(np.bincount([d.row for d in draws])) <= 1


def test_a_dropped_pair_is_mid_grey_whatever_it_was(tiny_config, data):
    config = tiny_config.model_copy(update={"dropout": tiny_config.dropout.model_copy(update={"example_pair": 0.5})})
    objective, _, _ = build_objective(config, data)
    torch.nn.init.normal_(objective.controlnet.example_stem.conv_out.weight)
    for block in objective.controlnet.trunk.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight)
    batch = objective.prepare(range(40))
    draws = [draw_sample(config, data, i) for i in range(40)]
    assert batch.has_example.tolist() == [d.has_example for d in draws]
    assert set(batch.has_example.tolist()) == {True, False}
    other = dataclasses.replace(batch, example_pairs=tuple(255 - side for side in batch.example_pairs))
    with torch.no_grad():
        changed = objective.compute_losses(batch)[0] != objective.compute_losses(other)[0]
    assert changed.tolist() == batch.has_example.tolist()


def test_a_sealed_training_is_a_pipeline_with_its_losses(train_inputs, tiny_config, tmp_path):
    config = tiny_config.model_copy(update={"num_steps": 3})
    events = []
    ref = obtain(
        Train(config, train_inputs),
        Context(str(tmp_path), TrainResources(log_every_steps=1), events.append),
    )
    manifest = open_manifest(ref.uri)
    assert isinstance(events[0], LaunchEvent)
    assert isinstance(events[1], HardwareEvent)
    assert [event.step for event in events if isinstance(event, StepEvent)] == [1, 2, 3]
    (validated,) = [event for event in events if isinstance(event, ValidationEvent)]
    assert (validated.step, validated.is_best) == (3, True)
    (grid,) = [event for event in events if isinstance(event, GridEvent)]
    assert read_bytes(grid.uri) == manifest.read_file("grid.png")
    losses = pq.read_table(tmp_path / "train" / ref.fingerprint / "losses.parquet").to_pylist()
    assert sum(row["num_samples"] for row in losses) == 3 * config.batch_size == manifest.counts["samples"]
    pipeline = load_pipeline(manifest.fetch_folder("pipeline", tmp_path / "cache"))
    assert (pipeline.default_num_inference_steps, pipeline.default_guidance_scale) == (3, 2.0)
    assert pipeline.config.default_image_size == 32  # of the images, whatever the base was made for
    fresh = load_base(config.base).unet.state_dict()
    moved = {
        name.split(".")[0] for name, value in pipeline.unet.state_dict().items() if not torch.equal(value, fresh[name])
    }
    assert moved == {"up_blocks", "conv_norm_out", "conv_out"}
    assert manifest.read_file("grid.png").startswith(b"\x89PNG")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert obtain(Train(config, train_inputs), Context(str(tmp_path), TrainResources())) == ref
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_two_processes_take_the_same_steps_as_one(train_inputs, tiny_config, tmp_path):
    stage = Train(tiny_config.model_copy(update={"num_steps": 3}), train_inputs)
    run_train(stage, str(tmp_path / "1"), TrainResources(), World())
    spec = write_spec(stage, str(tmp_path / "2"), TrainResources(num_processes=2))
    (port,) = find_free_ports()
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # what torchrun tells them
    ranks = [
        WarmProcess(
            run_module, "prompt_diffusion.training.run", spec, environment=os.environ | meeting | {"RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert open_manifest(stage.identity.uri(str(tmp_path / "2"))).counts["processes"] == 2
    refs = [stage.identity.uri(str(tmp_path / store)) for store in "12"]
    tables = (open_manifest(ref).read_file("losses.parquet") for ref in refs)
    one, two = (pq.read_table(io.BytesIO(data)).to_pydict() for data in tables)
    assert one["vision_task"] == two["vision_task"]
    assert one["num_samples"] == two["num_samples"]
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-3)


def test_a_baseline_has_no_example_stem(train_inputs, tiny_config, tmp_path):
    config = tiny_config.model_copy(update={"method": "controlnet", "vision_tasks": ("hed_to_image",), "num_steps": 1})
    ref = run_train(Train(config, train_inputs), str(tmp_path), TrainResources(), World())
    pipeline = load_pipeline(open_manifest(ref.uri).fetch_folder("pipeline", tmp_path / "cache"))
    assert not pipeline.controlnet.uses_example_pair


def test_a_training_depends_on_the_inputs_that_its_vision_tasks_read_and_on_no_other(train_inputs, tiny_config):
    config = tiny_config.model_copy(update={"vision_tasks": ("image_to_hed",)})
    changed = train_inputs.maps | {"depth": train_inputs.maps["depth"].model_copy(update={"fingerprint": "0" * 32})}
    other = train_inputs.model_copy(update={"maps": changed})
    assert Train(config, train_inputs).identity.fingerprint == Train(config, other).identity.fingerprint
    assert Train(tiny_config, train_inputs).identity.fingerprint != Train(tiny_config, other).identity.fingerprint


def test_a_recipe_that_the_base_was_not_trained_for_is_refused_before_the_first_step(
    train_inputs, tiny_config, tmp_path
):
    wrong = tiny_config.model_copy(
        update={"noise": tiny_config.noise.model_copy(update={"prediction_type": "epsilon"})}
    )
    with pytest.raises(ValueError, match=r"prediction_type is 'epsilon', but base .* was trained for 'v_prediction'"):
        run_train(Train(wrong, train_inputs), str(tmp_path), TrainResources(), World())
    wrong = tiny_config.model_copy(update={"stem_channels": (4, 8)})
    with pytest.raises(ValueError, match="give 3 channels"):
        run_train(Train(wrong, train_inputs), str(tmp_path), TrainResources(), World())
