"""What does not fit together is refused before the first step, in one sentence with both values."""

import pyarrow as pa
import pytest

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.ingest import Ingest, IngestConfig
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.model.base import load_base
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import open_manifest
from prompt_diffusion.store.sharded import run_sharded_stage
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.training.encode import Encode, EncodeConfig, EncodeResources
from prompt_diffusion.training.preflight import check_base, check_gpus, check_training
from prompt_diffusion.training.stage import Train

LOCAL = TrainResources()


@pytest.fixture(scope="module")
def larger(tmp_path_factory, tiny_base):
    """The same scenes as the other inputs, at twice the size: pairs, maps and latents."""
    store = str(tmp_path_factory.mktemp("larger"))
    config = IngestConfig(
        source=ScenesConfig(num_groups=20, pairs_per_group=2),
        image_size=64,
        shard_rows=16,
        split_fractions=(0.6, 0.2, 0.2),
    )
    pairs = obtain(Ingest(config), Context(store, None))
    maps = obtain(Annotate(AnnotateConfig(condition="depth"), pairs), Context(store, AnnotateResources()))
    return pairs, maps, obtain(Encode(EncodeConfig(base=tiny_base), pairs), Context(store, EncodeResources()))


def replace_depth(inputs, ref):
    return inputs.model_copy(update={"maps": inputs.maps | {"depth": ref}})


def rewrite(ref, store, change):
    """Seal what a manifest holds once more, each shard changed."""
    manifest = open_manifest(ref.uri)
    identity = StageIdentity(
        stage="annotate", version=1, config={}, inputs=(StageInput(role="changed", fingerprint=ref.fingerprint),)
    )

    def make_shard(index):
        return change(manifest.read_shard(manifest.shards[index])), []

    return run_sharded_stage(identity, store, len(manifest.shards), make_shard)


def check_refused(sentence, config, inputs, resources=LOCAL):
    with pytest.raises(ValueError, match=sentence) as caught:
        check_training(config, inputs, resources)
    assert "\n" not in str(caught.value)


def test_what_fits_together_passes(train_inputs, tiny_config):
    check_training(tiny_config, train_inputs, TrainResources(num_processes=3))
    check_base(tiny_config, load_base(tiny_config.base), train_inputs)


def test_a_batch_that_does_not_divide_among_the_processes(train_inputs, tiny_config):
    check_refused(
        "a batch of 6 samples does not divide among 4", tiny_config, train_inputs, TrainResources(num_processes=4)
    )


def test_fewer_samples_than_a_batch(train_inputs, tiny_config):
    config = tiny_config.model_copy(update={"batch_size": 32})
    check_refused("24 training samples, fewer than a batch of 32", config, train_inputs)


def test_maps_of_another_resolution(train_inputs, tiny_config, larger):
    check_refused(
        r"the maps of .* have \(64, 64\) pixels, .*\(32, 32\)", tiny_config, replace_depth(train_inputs, larger[1])
    )


def test_maps_of_other_pairs(train_inputs, tiny_config, tmp_path):
    def shift(table):
        return table.set_column(0, "sample_id", pa.array([f"other-{name}" for name in table["sample_id"].to_pylist()]))

    moved = replace_depth(train_inputs, rewrite(train_inputs.maps["depth"], str(tmp_path), shift))
    check_refused("is not aligned with the image pairs", tiny_config, moved)


def test_maps_of_fewer_pairs(train_inputs, tiny_config, tmp_path):
    fewer = rewrite(train_inputs.maps["depth"], str(tmp_path), lambda table: table.slice(0, table.num_rows - 1))
    check_refused("has 37 rows, the image pairs .* 40", tiny_config, replace_depth(train_inputs, fewer))


def test_a_missing_column(train_inputs, tiny_config, tmp_path):
    without = rewrite(train_inputs.maps["depth"], str(tmp_path), lambda table: table.drop_columns(["edited_map"]))
    check_refused(
        "has no column edited_map: it has sample_id, input_map", tiny_config, replace_depth(train_inputs, without)
    )


def test_a_column_of_another_type(train_inputs, tiny_config, tmp_path):
    def strip(table):
        return table.set_column(2, "edited_map", pa.array([cell["bytes"] for cell in table["edited_map"].to_pylist()]))

    plain = rewrite(train_inputs.maps["depth"], str(tmp_path), strip)
    check_refused("has a column edited_map of type binary, not struct", tiny_config, replace_depth(train_inputs, plain))


def test_latents_of_another_resolution_than_the_images(train_inputs, tiny_config, larger):
    wrong = train_inputs.model_copy(update={"latents": train_inputs.latents | {"image": larger[2]}})
    with pytest.raises(
        ValueError, match=r"the shape \(4, 16, 16\); images of 32 x 32 pixels make \(4, 8, 8\) with base"
    ):
        check_base(tiny_config, load_base(tiny_config.base), wrong)


def test_a_base_whose_text_encoder_is_another(train_inputs, tiny_config):
    base = load_base(tiny_config.base)
    base.unet.register_to_config(cross_attention_dim=2048)
    with pytest.raises(ValueError, match="its UNet attends to text of 2048 channels and its text encoder gives 16"):
        check_base(tiny_config, base, train_inputs)


def test_a_base_whose_autoencoder_is_another(train_inputs, tiny_config):
    base = load_base(tiny_config.base)
    base.unet.register_to_config(in_channels=16)
    with pytest.raises(ValueError, match="its UNet takes 16 channels and its autoencoder gives 4"):
        check_base(tiny_config, base, train_inputs)


@pytest.mark.parametrize(
    ("device", "num_processes", "num_gpus", "sentence"),
    [
        ("cuda", 1, 0, "device .cuda. cannot be used on this machine"),
        ("cuda", 4, 2, "4 processes need a GPU each and this machine has 2"),
        ("auto", 4, 2, "4 processes need a GPU each and this machine has 2"),
        ("auto", 4, 0, None),
        ("cpu", 4, 2, None),
        ("cuda", 2, 2, None),
    ],
)
def test_each_process_has_a_gpu_where_it_needs_one(device, num_processes, num_gpus, sentence):
    resources = TrainResources(device=device, num_processes=num_processes)
    if sentence is None:
        check_gpus(resources, num_gpus)
        return
    with pytest.raises(ValueError, match=sentence):
        check_gpus(resources, num_gpus)


def test_launching_refuses_before_a_process_starts_and_writes_nothing(train_inputs, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="does not divide"):
        obtain(Train(tiny_config, train_inputs), Context(str(tmp_path), TrainResources(num_processes=4)))
    assert list(tmp_path.iterdir()) == []
