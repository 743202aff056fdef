"""Micro-batches: what is in them, that nothing but (seed, index, sizes) decides it, and what is fetched for them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data import sampler
from prompt_diffusion.data.ingest import Ingest, IngestConfig
from prompt_diffusion.data.records import read_array
from prompt_diffusion.data.sampler import split_batch
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.data.transforms import decode_image, to_model_range
from prompt_diffusion.engine.noise import draw_timestep, sample_noise
from prompt_diffusion.store.manifest import DamagedDataError, open_manifest
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.training.encode import (
    Encode,
    EncodeConfig,
    EncodeResources,
    EncodeText,
)
from prompt_diffusion.training.inputs import TrainInputs
from prompt_diffusion.training.loss import InContextObjective
from prompt_diffusion.training.rows import WindowFetcher, open_training_data
from prompt_diffusion.training.samples import BatchMaker, InContextBatch, draw_sample
from prompt_diffusion.training.train import build_controlnet

NUM_SHARDS = 8


@pytest.fixture(scope="module")
def small_inputs(tiny_base, tmp_path_factory):
    """Other pairs: one a shard, with depth alone."""
    store, encode = str(tmp_path_factory.mktemp("small")), EncodeConfig(base=tiny_base)
    source = ScenesConfig(num_groups=NUM_SHARDS, pairs_per_group=1)
    pairs = obtain(
        Ingest(IngestConfig(source=source, image_size=32, shard_rows=1, split_fractions=(1, 0, 0))),
        Context(store, None),
    )
    maps = {"depth": obtain(Annotate(AnnotateConfig(condition="depth"), pairs), Context(store, AnnotateResources()))}
    latents = {"image": obtain(Encode(encode, pairs), Context(store, EncodeResources()))}
    return TrainInputs(
        pairs=pairs,
        maps=maps,
        latents=latents,
        text=obtain(EncodeText(encode, pairs), Context(store, EncodeResources())),
    )


@pytest.fixture
def small_config(tiny_config):
    return tiny_config.model_copy(update={"vision_tasks": ("depth_to_image",), "seed": 77})


def make_batches(config, data, fixed_texts, pieces, num_threads=1):
    maker = BatchMaker(config, data, fixed_texts, 1000, num_threads)
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(maker.make, pieces))
    finally:
        maker.close()


def join(batches) -> dict[str, torch.Tensor]:
    """Return the tensors of several micro-batches, none of them augmented, as if they were one."""
    assert all(batch.made_targets is None for batch in batches)
    parts = [
        {
            **{name: value for name, value in vars(batch).items() if name not in ("example_pairs", "made_targets")},
            "labels": torch.tensor(batch.labels),
            "example_source": batch.example_pairs[0],
            "example_target": batch.example_pairs[1],
        }
        for batch in batches
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def cut(indices: range, sizes) -> list[range]:
    pieces, start = [], indices.start
    while start < indices.stop:
        for size in sizes:
            pieces.append(range(start, min(start + size, indices.stop)))
            start += size
    return [piece for piece in pieces if piece]


@pytest.mark.parametrize(("sizes", "num_threads"), [((1,), 1), ((1,), 4), ((5, 1, 7), 1), ((5, 1, 7), 4), ((60,), 4)])
def test_a_batch_depends_neither_on_threads_nor_on_how_it_is_cut(data, tiny_config, fixed_texts, sizes, num_threads):
    whole = join(make_batches(tiny_config, data, fixed_texts, [range(3, 63)]))
    cuts = join(make_batches(tiny_config, data, fixed_texts, cut(range(3, 63), sizes), num_threads))
    assert whole.keys() == cuts.keys()
    for name, value in whole.items():
        assert torch.equal(value, cuts[name]), name


def test_a_batch_holds_what_its_samples_are_made_of(data, tiny_config, fixed_texts):
    [batch] = make_batches(tiny_config, data, fixed_texts, [range(48)])
    names = set()
    for slot in range(48):
        draw = draw_sample(tiny_config, data, slot)
        rows = draw.data.rows
        sample = rows.assemble(draw.vision_task, draw.row, draw.example_row)
        names.add(draw.vision_task.name)
        assert tiny_config.vision_tasks[batch.labels[slot]] == draw.vision_task.name
        assert bool(batch.has_example[slot]) is draw.has_example
        np.testing.assert_array_equal(batch.example_pairs[0][slot], sample.example_source)
        np.testing.assert_array_equal(batch.example_pairs[1][slot], sample.example_target)
        np.testing.assert_array_equal(batch.queries[slot], sample.query)
        assert batch.timesteps[slot] == draw_timestep(draw.generator, tiny_config.noise, 1000)
        mean, std = map(torch.from_numpy, draw.data.read_posterior(draw.vision_task.target_condition, draw.row))
        assert torch.equal(batch.clean[slot], mean + std * sample_noise(draw.generator, mean.shape))
        assert torch.equal(batch.noise[slot], sample_noise(draw.generator, mean.shape))
        if not draw.has_text or draw.vision_task.text:
            text = fixed_texts[draw.vision_task.text if draw.has_text else ""]
        else:
            text = draw.data.read_text(draw.row)
        np.testing.assert_array_equal(batch.text[slot], text)
    assert len(names) == 6


def encode_online(base, inputs):
    """Return mean and deviation of every edited image by (target, shard, row), and the embedding of every caption."""
    posteriors, texts, pairs = {}, {}, open_manifest(inputs.pairs.uri)
    for target, ref in {None: inputs.pairs, **inputs.maps}.items():
        manifest = open_manifest(ref.uri)
        for number, shard in enumerate(manifest.shards):
            column = manifest.read_shard(shard)["edited_image" if target is None else "edited_map"]
            images = np.stack([decode_image(cell["bytes"].as_py()) for cell in column])
            with torch.no_grad():
                posterior = base.vae.encode(to_model_range(images)).latent_dist
            for row in range(len(images)):
                scale = base.vae.config.scaling_factor
                posteriors[target, number, row] = posterior.mean[row] * scale, posterior.std[row] * scale
    for shard in pairs.shards:
        captions = list(dict.fromkeys(pairs.read_shard(shard)["edited_prompt"].to_pylist()))
        texts |= zip(captions, base.encode_text(captions), strict=True)
    return posteriors, texts


def test_stored_posteriors_and_texts_are_the_encoders_and_so_is_the_loss(base, data, tiny_config, train_inputs):
    posteriors, texts = encode_online(base, train_inputs)
    its = data["image_to_hed"]
    for row, place in enumerate(its.rows.places):
        for target in (None, "depth", "hed", "seg"):
            for stored, online in zip(its.read_posterior(target, row), posteriors[(target, *place)], strict=True):
                np.testing.assert_array_equal(stored, online)
        np.testing.assert_array_equal(its.read_text(row), texts[its.rows.captions("edited")[row]])
    controlnet = build_controlnet(tiny_config, base)
    objective = InContextObjective(tiny_config, base, controlnet, data, torch.device("cpu"))
    batch = objective.prepare(range(24))
    clean, text = batch.clean.clone(), batch.text.clone()
    for slot in range(24):
        draw = draw_sample(tiny_config, data, slot)
        draw_timestep(draw.generator, tiny_config.noise, 1000)
        mean, std = posteriors[(draw.vision_task.target_condition, *its.rows.places[draw.row])]
        clean[slot] = mean + std * sample_noise(draw.generator, mean.shape)
        if draw.has_text and draw.vision_task.text is None:
            text[slot] = texts[its.rows.captions("edited")[draw.row]]
    with torch.no_grad():
        stored, online, other = (
            objective.compute_losses(each)[0]
            for each in (batch, replace(batch, clean=clean, text=text), replace(batch, clean=clean + 0.01, text=text))
        )
    objective.close()
    assert torch.equal(stored, online)
    assert not torch.equal(stored, other)


def test_an_encoder_that_is_asked_one_by_one_agrees_to_rounding(base, data):
    its = data["image_to_hed"]
    for row in range(0, its.rows.num_rows, 5):
        for target in (None, "hed"):
            image = its.rows.image(row, "edited", target)
            with torch.no_grad():
                posterior = base.vae.encode(to_model_range(image[None])).latent_dist
            online = (part[0] * base.vae.config.scaling_factor for part in (posterior.mean, posterior.std))
            for stored, value in zip(its.read_posterior(target, row), online, strict=True):
                np.testing.assert_allclose(stored, value, rtol=1e-4, atol=1e-6)
        caption = its.rows.captions("edited")[row]
        np.testing.assert_allclose(its.read_text(row), base.encode_text([caption])[0], rtol=1e-4, atol=1e-5)


def list_stream(config, inputs, fixed_texts, cache, world_size, micro_batch):
    """Return (sample id, example id, vision task, timestep) of eight steps as their processes make them."""
    stream = []
    for rank in range(world_size):
        its_data = open_training_data(config, inputs, cache, "train")
        shares = [split_batch(step, config.batch_size, rank, world_size) for step in range(8)]
        pieces = [piece for share in shares for piece in cut(share, (micro_batch,))]
        for piece, batch in zip(pieces, make_batches(config, its_data, fixed_texts, pieces), strict=True):
            for index, label, timestep in zip(piece, batch.labels, batch.timesteps.tolist(), strict=True):
                draw = draw_sample(config, its_data, index)
                ids = draw.data.rows.sample_ids
                stream.append((index, ids[draw.row], ids[draw.example_row], config.vision_tasks[label], timestep))
    return [entry[1:] for entry in sorted(stream)]


def test_the_stream_is_one_for_any_world_size_and_micro_batch(train_inputs, tiny_config, data, fixed_texts):
    cache = data["image_to_hed"].cache
    expected = list_stream(tiny_config, train_inputs, fixed_texts, cache, 1, 6)
    assert len(expected) == 48
    assert len(set(expected)) == 48
    for world_size, micro_batch in [(1, 1), (1, 4), (2, 3), (2, 2), (3, 2), (3, 1), (6, 1)]:
        stream = list_stream(tiny_config, train_inputs, fixed_texts, cache, world_size, micro_batch)
        assert stream == expected, (world_size, micro_batch)


@pytest.mark.parametrize("index", [0, 3, NUM_SHARDS - 1])
def test_the_present_window_and_the_next_are_fetched_and_no_other(
    small_inputs, small_config, tmp_path, monkeypatch, index
):
    monkeypatch.setattr(sampler, "WINDOW_SHARDS", 2)
    its = open_training_data(small_config, small_inputs, ShardCache(tmp_path), "train")["depth_to_image"]
    windows = [window for epoch in (0, 1) for window in its.order.windows(epoch)]
    with ThreadPoolExecutor(2) as pool:
        fetcher = WindowFetcher(its, pool)
        fetcher.advance(index)
        fetcher.advance(index)
    expected = {
        manifest.shards[shard].sha256
        for manifest in its.manifests
        for window in windows[index // 2 : index // 2 + 2]
        for shard in window
    }
    assert len(its.manifests) == 4
    assert {path.name for path in tmp_path.iterdir()} == {*expected, ".locks"}


def test_a_damaged_shard_is_an_error_where_a_row_of_it_is_read_and_nowhere_else(
    small_inputs, small_config, fixed_texts, tmp_path
):
    old, store = str(Path(small_inputs.pairs.uri).parents[1]), str(tmp_path / "store")
    shutil.copytree(old, store)
    inputs = TrainInputs.model_validate_json(small_inputs.model_dump_json().replace(old, store))
    damaged = Path(inputs.latents["image"].uri) / "shard-00005.parquet"
    content = bytearray(damaged.read_bytes())
    content[60] ^= 1
    damaged.write_bytes(content)
    config = small_config.model_copy(update={"map_to_image_examples": {"same_row": 1.0}})
    data = open_training_data(config, inputs, ShardCache(tmp_path / "cache"), "train")
    maker = BatchMaker(config, data, fixed_texts, 1000)
    made: list[InContextBatch] = []
    try:
        for index in range(NUM_SHARDS):
            if draw_sample(config, data, index).row == 5:
                with pytest.raises(DamagedDataError, match=r"shard-00005\.parquet has the digest"):
                    maker.make(range(index, index + 1))
            else:
                made.append(maker.make(range(index, index + 1)))
    finally:
        maker.close()
    assert len(made) == NUM_SHARDS - 1


def test_latents_and_texts_of_other_pairs_are_refused(train_inputs, small_inputs, tiny_config, tmp_path):
    def exchange(name, ref):
        return train_inputs.model_copy(update={"latents": {**train_inputs.latents, name: ref}})

    for inputs, reason in (
        (train_inputs.model_copy(update={"text": small_inputs.text}), "other pairs"),
        (exchange("image", small_inputs.latents["image"]), "other images"),
        (exchange("hed", train_inputs.latents["depth"]), "other images"),
    ):
        with pytest.raises(ValueError, match=f"is not aligned with .*: it was made of {reason}$") as caught:
            open_training_data(tiny_config, inputs, ShardCache(tmp_path), "train")
        assert "\n" not in str(caught.value)


def test_a_text_is_the_embedding_of_its_own_caption(data, train_inputs):
    its, text = data["depth_to_image"], open_manifest(train_inputs.text.uri)
    for row, (shard, _) in enumerate(its.rows.places):
        table = text.read_shard(text.shards[shard])
        position = table["caption"].to_pylist().index(its.rows.captions("edited")[row])
        np.testing.assert_array_equal(its.read_text(row), read_array(table, "embedding")[position])


def test_by_group_a_training_draws_each_prompt_group_equally_often_and_by_row_each_row(
    train_inputs, tiny_config, tmp_path
):
    cache = ShardCache(tmp_path)
    for draw, per_epoch in (("group", 12), ("row", 24)):
        config = tiny_config.model_copy(update={"draw": draw})
        data = open_training_data(config, train_inputs, cache, "train")
        rows = next(iter(data.values())).rows
        drawn = [draw_sample(config, data, index).row for index in range(4 * per_epoch)]
        assert len(set(drawn)) > 12
        for start in range(0, len(drawn), per_epoch):
            epoch = drawn[start : start + per_epoch]
            groups = [rows.group_ids[row] for row in epoch]
            assert len(set(groups if draw == "group" else epoch)) == per_epoch
