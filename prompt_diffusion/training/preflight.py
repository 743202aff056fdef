"""Checks before the first step; each refusal is one sentence with both values.

``check_training`` needs no torch and runs before a process starts; ``check_gpus`` and ``check_base`` run in the training
processes, before and after the base is loaded.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from prompt_diffusion.data.records import ARRAY_SHAPES_KEY, CONDITION_MAP_SCHEMA, IMAGE_PAIR_SCHEMA
from prompt_diffusion.data.transforms import decode_image
from prompt_diffusion.device import name_device, refuse
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.store.manifest import Manifest, StoredFile, open_manifest
from prompt_diffusion.store.uris import join_uri
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.inputs import TrainInputs

if TYPE_CHECKING:
    from prompt_diffusion.model.base import Base

_PAIR_COLUMNS: dict[str, Any] = {
    name: IMAGE_PAIR_SCHEMA.field(name).type
    for name in ("sample_id", "group_id", "split", "input_prompt", "edited_prompt", "input_image", "edited_image")
}
_MAP_COLUMNS: dict[str, Any] = {field.name: field.type for field in CONDITION_MAP_SCHEMA}
_LATENT_COLUMNS: dict[str, Any] = {"sample_id": pa.string(), "edited_mean": None, "edited_std": None}
_READ_BYTES = 1 << 16


def check_training(config: TrainConfig, inputs: TrainInputs, resources: TrainResources) -> None:
    """Raise ValueError where recipe, inputs and resources do not fit together; reads a few rows of each manifest."""
    if config.batch_size % resources.num_processes:
        raise ValueError(
            f"a batch of {config.batch_size} samples does not divide among {resources.num_processes} processes: change "
            "batch_size or num_processes"
        )
    used = inputs.narrow(config.vision_tasks)
    _check_rows(config, [dataset.pairs.uri for dataset in used.datasets])
    for dataset in used.datasets:
        _check_dataset(dataset)


def check_gpus(resources: TrainResources, num_gpus: int) -> None:
    """Raise ValueError where this machine has fewer GPUs than processes that need one."""
    if not name_device(resources.device, num_gpus).startswith("cuda"):
        return
    if num_gpus == 0:
        raise refuse(resources.device)
    if resources.num_processes > num_gpus:
        raise ValueError(
            f"{resources.num_processes} processes need a GPU each and this machine has {num_gpus}: lower num_processes, or "
            "set device to 'cpu'"
        )


def check_base(config: TrainConfig, base: "Base", inputs: TrainInputs) -> None:
    """Raise ValueError where the parts of a base do not fit together, or the inputs were made for another base."""
    text, latent = base.text_encoder.config.hidden_size, base.vae.config["latent_channels"]
    wanted = base.unet.config["cross_attention_dim"]
    if {text} != set(wanted if isinstance(wanted, list | tuple) else [wanted]):
        raise ValueError(
            f"base {config.base!r} is of another architecture than Stable Diffusion v1: its UNet attends to text of {wanted} "
            f"channels and its text encoder gives {text}"
        )
    if base.unet.config["in_channels"] != latent:
        raise ValueError(
            f"base {config.base!r} is of another architecture than Stable Diffusion v1: its UNet takes "
            f"{base.unet.config['in_channels']} channels and its autoencoder gives {latent}"
        )
    for dataset in inputs.narrow(config.vision_tasks).datasets:
        width, height = _image_size(_read_first_row(open_manifest(dataset.pairs.uri), _PAIR_COLUMNS)["edited_image"])
        expected = (latent, height // base.latent_stride, width // base.latent_stride)
        for ref in dataset.latents.values():
            shape = _read_latent_shape(open_manifest(ref.uri))
            if shape != expected:
                raise ValueError(
                    f"the latents of {ref.uri} have the shape {shape}; images of {width} x {height} pixels make {expected} "
                    f"with base {config.base!r}"
                )


def _check_rows(config: TrainConfig, uris: Sequence[str]) -> None:
    """Refuse fewer training samples in all image pairs than a batch; reads shards only until there are enough."""
    found = 0
    for uri in uris:
        manifest = open_manifest(uri)
        for shard in manifest.shards:
            split = manifest.read_columns(shard, ["split"])["split"]
            found += pc.sum(pc.equal(split, "train")).as_py() or 0
            if found >= config.batch_size:
                return
    raise ValueError(
        f"{_join_names(uris)} has {found} training samples, fewer than a batch of {config.batch_size}: lower batch_size or add "
        "samples"
    )


def _check_dataset(dataset: TrainInputs) -> None:
    """Refuse manifests of one dataset whose columns, rows or image sizes do not match."""
    pairs = open_manifest(dataset.pairs.uri)
    first = _read_first_row(pairs, _PAIR_COLUMNS)
    size = _image_size(first["edited_image"])
    for ref in dataset.maps.values():
        row = _check_alignment(open_manifest(ref.uri), _MAP_COLUMNS, pairs, first)
        if _image_size(row["edited_map"]) != size:
            raise ValueError(
                f"the maps of {ref.uri} have {_image_size(row['edited_map'])} pixels, the images of {pairs.ref.uri} {size}"
            )
    for ref in dataset.latents.values():
        _check_alignment(open_manifest(ref.uri), _LATENT_COLUMNS, pairs, first)


def _check_alignment(
    manifest: Manifest, columns: Mapping[str, Any], pairs: Manifest, first: dict[str, Any]
) -> dict[str, Any]:
    """Return the first row of a manifest whose rows correspond to the image pairs'; ValueError where they do not."""
    row = _read_first_row(manifest, columns)
    rows, expected = ([shard.rows for shard in m.shards] for m in (manifest, pairs))
    if sum(rows) != sum(expected):
        raise ValueError(f"{manifest.ref.uri} has {sum(rows)} rows, the image pairs {pairs.ref.uri} {sum(expected)}")
    if rows != expected or row["sample_id"] != first["sample_id"]:
        raise ValueError(f"{manifest.ref.uri} is not aligned with the image pairs {pairs.ref.uri}")
    return row


def _read_first_row(manifest: Manifest, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first row; ValueError names a column that is missing or of another type (None takes any)."""
    shard = _first_shard(manifest)
    uri = join_uri(manifest.ref.uri, shard.path)
    with manifest.open_shard(shard, buffer_size=_READ_BYTES, pre_buffer=False) as parquet:
        _check_columns(uri, parquet.schema_arrow, columns)
        row: dict[str, Any] = next(parquet.iter_batches(1, columns=list(columns))).to_pylist()[0]
    return row


def _check_columns(uri: str, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise ValueError(f"{uri} has no column {_join_names(missing)}: it has {_join_names(schema.names)}")
    for name, kind in columns.items():
        if kind is not None and schema.field(name).type != kind:
            raise ValueError(f"{uri} has a column {name} of type {schema.field(name).type}, not {kind}")


def _read_latent_shape(manifest: Manifest) -> tuple[int, ...]:
    with manifest.open_shard(_first_shard(manifest)) as file:
        metadata = file.schema_arrow.metadata or {}
    return tuple(json.loads(metadata[ARRAY_SHAPES_KEY])["edited_mean"])


def _first_shard(manifest: Manifest) -> StoredFile:
    for shard in manifest.shards:
        if shard.rows:
            return shard
    raise ValueError(f"{manifest.ref.uri} has no rows")


def _image_size(cell: dict[str, Any]) -> tuple[int, int]:
    """Return the width and height of a stored image."""
    height, width, _ = decode_image(cell["bytes"]).shape
    return width, height


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(names)
