import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prompt_diffusion.data.dataset import Dataset
from prompt_diffusion.data.sources.scenes import build_scene_pair
from prompt_diffusion.engine.checkpoint import list_checkpoints
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.distributed import SINGLE_PROCESS
from prompt_diffusion.engine.events import Event, StepEvent, ValidationEvent
from prompt_diffusion.engine.optimizer import learning_rate_factor
from prompt_diffusion.model.base import load_base
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.latents import PretrainLatents, load_autoencoder, open_pictures, read_latents
from prompt_diffusion.pretraining.objectives import Pictures, standardise_latents
from prompt_diffusion.pretraining.score import HELD_OUT_SEED, score_autoencoder
from prompt_diffusion.pretraining.stage import Pretrain, PretrainAutoencoder, export_progress
from prompt_diffusion.pretraining.train import (
    build_base,
    build_vae,
    encode_pictures,
    train_autoencoder,
    train_text_to_image,
    train_tokenizer,
)
from prompt_diffusion.store.lease import Lease, LeaseLostError
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.records import ShardProgress
from prompt_diffusion.store.stage import Context, obtain
from tests.sharing import TINY_BASE

RESOURCES = TrainResources(loader_threads=1, validate_every_steps=2, log_every_steps=1)
TINY = PretrainConfig(
    **TINY_BASE,
    vae_shares={"image": 0.4, "depth": 0.2, "seg_palette": 0.2, "hed_style": 0.2},
    unet_shares={"image": 0.3, "image_mirrored": 0.3, "depth": 0.2, "seg_palette": 0.2},
    vae_batch_size=4,
    vae_steps=5,
    unet_batch_size=4,
    unet_steps=4,
)


def test_standardised_latents_are_standard_and_decode_to_the_same_pictures():
    torch.manual_seed(0)
    vae = build_vae(PretrainConfig(vae_channels=(8, 16))).eval().requires_grad_(False)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    latents = encode_pictures(vae, images)
    posterior = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist
    before, scale = vae.decode(latents).sample, latents.std(dim=(0, 2, 3))
    standardise_latents(vae, latents)
    after = encode_pictures(vae, images)
    torch.testing.assert_close(after.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(after).sample, before, atol=1e-4, rtol=1e-4)
    # the posterior's width shrinks with its channel
    width = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.std / posterior.std
    torch.testing.assert_close(width.mean(dim=(0, 2, 3)), 1 / scale, rtol=1e-3, atol=0)


def test_the_tokenizer_tells_captions_apart_and_survives_saving(tmp_path):
    captions = [
        "a red cube left of a blue sphere on a green floor",
        "a blue cube left of a red sphere on a sandy floor",
    ]
    tokenizer = train_tokenizer(captions, PretrainConfig(vocabulary_size=120))
    tokens = [tokenizer(caption).input_ids for caption in captions]
    assert tokens[0] != tokens[1]
    assert all(ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id for ids in tokens)
    assert all(len(ids) <= 14 for ids in tokens), "common words should be one token each"
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert [again(caption).input_ids for caption in captions] == tokens
    assert again.model_max_length == 32


def learn_vocabulary():
    """Return the vocabulary learned from the captions of some scenes, as text."""
    captions = [build_scene_pair(0, index, 16).input_prompt for index in range(40)]
    return repr(sorted(train_tokenizer(captions, PretrainConfig()).get_vocab().items()))


def test_the_tokenizer_is_the_same_in_every_process():
    code = "from tests.pretraining.test_pretrain import learn_vocabulary; print(learn_vocabulary())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == learn_vocabulary()


@pytest.fixture(scope="module")
def dataset(scene_inputs):
    return Dataset(pairs=scene_inputs.pairs, maps=scene_inputs.maps)


@pytest.fixture(scope="module")
def pretrained(scene_inputs, dataset):
    """Return the sealed autoencoder, latents and base of a tiny recipe, and what each stage reported."""
    heard = {}

    def make(stage):
        heard[stage.title] = []
        return obtain(stage, Context(scene_inputs.store, RESOURCES, heard[stage.title].append))

    autoencoder = make(PretrainAutoencoder(TINY, dataset))
    latents = make(PretrainLatents(TINY, autoencoder, dataset))
    return autoencoder, latents, make(Pretrain(TINY, autoencoder, latents, dataset)), heard


def test_each_stage_reports_how_far_it_is(pretrained):
    heard = pretrained[3]
    for title, num_steps in (("pretrain autoencoder", TINY.vae_steps), ("pretrain base", TINY.unet_steps)):
        assert all(isinstance(progress, Event) for progress in heard[title])
        steps = [event.step for event in heard[title] if isinstance(event, StepEvent)]
        assert steps == list(range(1, num_steps + 1))
        assert [event.step for event in heard[title] if isinstance(event, ValidationEvent)][-1] == num_steps
    shards = heard["pretrain latents"]
    assert all(isinstance(progress, ShardProgress) for progress in shards)
    assert (shards[-1].num_done, shards[-1].num_rows) == (shards[-1].num_shards, 24)


def test_a_pretraining_keeps_others_out_while_it_trains_and_trains_nothing_that_is_sealed(
    pretrained, scene_inputs, dataset, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a batch system may leave it
    autoencoder, latents, *_ = pretrained
    config = TINY.model_copy(update={"seed": 7, "vae_steps": 2, "unet_steps": 2})
    for stage in (PretrainAutoencoder(config, dataset), Pretrain(config, autoencoder, latents, dataset)):
        others = []

        def look(event, stage=stage, others=others):
            others.append(Lease(stage.identity.uri(scene_inputs.store)).try_acquire())

        ref = stage.run(Context(scene_inputs.store, RESOURCES, look))
        assert others
        assert not any(others)
        heard = []
        assert stage.run(Context(scene_inputs.store, RESOURCES, heard.append)) == ref
        assert not heard


def test_a_pretraining_that_was_followed_by_another_run_writes_no_checkpoint(pretrained, dataset, tmp_path):
    def refuse():
        raise LeaseLostError("taken over")

    autoencoder, latents, *_ = pretrained
    shown = open_pictures(dataset, "train", RESOURCES)
    common = {"resources": RESOURCES, "world": SINGLE_PROCESS, "check_owner": refuse}
    pictures = Pictures(shown.read, shown.captions, TINY.vae_shares)
    with pytest.raises(LeaseLostError):
        train_autoencoder(TINY, pictures, str(tmp_path / "vae"), **common)
    base = build_base(TINY, load_autoencoder(autoencoder), shown.captions)
    found = read_latents(latents, TINY.unet_shares)
    with pytest.raises(LeaseLostError):
        train_text_to_image(TINY, base, found, shown.captions, str(tmp_path / "unet"), **common)
    assert not list_checkpoints(str(tmp_path / "vae"))
    assert not list_checkpoints(str(tmp_path / "unet"))


def test_the_sealed_base_loads_and_its_card_has_the_floor_of_every_kind(pretrained, tmp_path):
    folder = open_manifest(pretrained[2].uri).fetch_folder("base", tmp_path)
    base = load_base(str(folder))
    assert base.vae.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 32, 32)
    card = (folder / "README.md").read_text()
    assert all(f"| {kind} | " in card for kind in TINY.vae_shares)


def test_the_base_as_it_stands_at_the_last_checkpoint_is_the_sealed_base(pretrained, scene_inputs, dataset, tmp_path):
    autoencoder, latents, base, _ = pretrained
    stage, context = Pretrain(TINY, autoencoder, latents, dataset), Context(scene_inputs.store, RESOURCES)
    step = export_progress(stage, context, tmp_path / "now")
    assert step == TINY.unet_steps
    sealed = open_manifest(base.uri).fetch_folder("base", tmp_path)
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "README.md"):
        assert (tmp_path / "now" / file).read_bytes() == (sealed / file).read_bytes()
    weights = load_file(sealed / "unet/diffusion_pytorch_model.safetensors")
    assert all(value.dtype == torch.float16 for value in weights.values())
    other = replace(stage, config=TINY.model_copy(update={"unet_steps": 100}))
    with pytest.raises(ValueError, match="no checkpoint yet"):
        export_progress(other, context, tmp_path / "other")


def test_photographs_have_latents_of_both_sides_and_maps_of_one(pretrained, dataset):
    autoencoder, latents, *_ = pretrained
    shown = open_pictures(dataset, "train", RESOURCES)
    found, vae = read_latents(latents, TINY.unet_shares), load_autoencoder(autoencoder)
    assert {kind: len(values) for kind, values in found.items()} == {
        "image": 48, "image_mirrored": 48, "depth": 24, "seg_palette": 24
    }  # fmt: skip
    expected = {
        ("image", 5): shown.read("image", 5),
        ("image_mirrored", 5): shown.read("image", 5)[:, ::-1],
        ("depth", 5): shown.read("depth", 10),
    }
    for (kind, row), picture in expected.items():
        torch.testing.assert_close(found[kind][row], encode_pictures(vae, [picture])[0], rtol=1e-4, atol=1e-4)
    mean, std = found["image"].mean(dim=(0, 2, 3)), found["image"].std(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(std, torch.ones(4), atol=1e-3, rtol=0)


def test_what_shapes_the_text_to_image_training_alone_moves_its_identity_alone(pretrained, dataset):
    autoencoder, latents, *_ = pretrained

    def identify(config):
        return (
            PretrainAutoencoder(config, dataset).identity,
            PretrainLatents(config, autoencoder, dataset).identity,
            Pretrain(config, autoencoder, latents, dataset).identity,
        )

    of_tiny = identify(TINY)
    of_longer = identify(TINY.model_copy(update={"unet_steps": 400, "text_dropout": 0.2}))
    assert of_longer[:2] == of_tiny[:2]
    assert of_longer[2] != of_tiny[2]
    assert identify(TINY.model_copy(update={"vae_channels": (8, 8, 16)}))[0] != of_tiny[0]
    assert identify(TINY.model_copy(update={"seed": 1}))[1] != of_tiny[1]


@pytest.mark.parametrize("kind", ["depth", "depth_ramp"])
def test_a_kind_of_picture_that_the_dataset_lacks_is_refused_before_anything_is_trained(dataset, kind):
    ref = dataset.pairs
    without = Dataset(pairs=ref, maps={name: maps for name, maps in dataset.maps.items() if name != "depth"})
    config = TINY.model_copy(update={"vae_shares": {"image": 0.5, kind: 0.5}, "unet_shares": {"image": 0.5, kind: 0.5}})
    for stage in (
        PretrainAutoencoder(config, without),
        PretrainLatents(config, ref, without),
        Pretrain(config, ref, ref, without),
    ):
        with pytest.raises(ValueError, match="no maps of condition 'depth', only of hed, seg"):
            stage.identify()


def test_the_number_of_steps_may_be_chosen_late():
    short, long = (PretrainConfig(unet_steps=steps) for steps in (10_000, 20_000))
    flat = int(short.unet_steps * short.unet_optimizer.flat_fraction)
    assert flat >= 5000
    rates = [
        [learning_rate_factor(step, config.unet_steps, config.unet_optimizer) for step in range(flat)]
        for config in (short, long)
    ]
    assert rates[0] == rates[1]


def test_scores_are_taken_on_members_that_no_training_draws(dataset):
    class Perfect:
        """Restores everything, and remembers what it was shown."""

        def __init__(self):
            self.shown = []

        def encode(self, images):
            self.shown.append(images)
            return self._wrap(mean=images)

        def decode(self, latents):
            return self._wrap(sample=latents)

        def _wrap(self, **values):
            result = type("Output", (), values)()
            result.latent_dist = result
            return result

    shown = open_pictures(dataset, "validation", RESOURCES)
    vae = Perfect()
    scores = score_autoencoder(vae, shown.read, ["seg_palette"], 8)
    assert scores["seg_palette"].rmse == 0.0
    assert scores["seg_palette"].psnr == 120.0
    assert HELD_OUT_SEED not in (TINY.seed, TINY.seed + 1)
    assert len(torch.unique(torch.cat(vae.shown).flatten(2).transpose(1, 2).flatten(0, 1), dim=0)) > 16
