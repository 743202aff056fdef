"""Import of a folder of diffusers' port of Prompt Diffusion, such as ``zhendongw/prompt-diffusion-diffusers``.

The port keeps both stems beside the trunk: ``controlnet_cond_embedding`` reads the example pair,
``controlnet_query_cond_embedding`` the query. Its pipeline feeds them images in [0, 1]; the weights are the released ones,
trained on [-1, 1], and that is how they are used here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from transformers import CLIPTokenizer

from prompt_diffusion.model.base import compute_latent_stride
from prompt_diffusion.model.original.folders import find_weights, read_config, read_weights
from prompt_diffusion.model.original.parts import (
    CHECKING,
    DIGESTING,
    WRITING,
    ImportReport,
    OnPhase,
    build_networks,
    check_free,
    count_parts,
    fill_network,
    new_folder,
    tell_nobody,
    write_model,
)
from prompt_diffusion.model.original.read import check_types, check_values
from prompt_diffusion.model.original.schedule import PUBLISHED_BETAS, build_scheduler
from prompt_diffusion.model.original.tokenizer import fit_tokenizer, read_tokenizer
from prompt_diffusion.store.digest import digest_file

PORT_CLASS = "PromptDiffusionControlNetModel"
_OUR_CLASS = "PromptDiffusionControlNet"
_STEMS = {"controlnet_cond_embedding.": "example_stem.", "controlnet_query_cond_embedding.": "query_stem."}
_NETWORKS = ("vae", "unet", "text_encoder", "controlnet")
# what the port's control model must have in common with the UNet beside it
_SHARED = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim", "attention_head_dim")
_READ = (*_NETWORKS, "tokenizer", "scheduler", "model_index.json")


def import_bundle(
    folder: Path,
    out: Path,
    *,
    tokenizer: CLIPTokenizer | None = None,
    image_size: int | None = None,
    on_phase: OnPhase = tell_nobody,
) -> ImportReport:
    """Write a folder of diffusers' port as a pipeline of ours, every tensor accounted for.

    ``tokenizer`` None takes the folder's own; ``image_size`` None the size that its UNet states. Raises ValueError, in one
    sentence, as ``import_checkpoint`` does.
    """
    check_free(out)
    configs = {part: read_config(folder / part) for part in (*_NETWORKS, "scheduler")}
    _check_kind(folder, configs)
    stem_channels = configs["controlnet"].get("conditioning_embedding_out_channels", (16, 32, 96, 256))
    stride = compute_latent_stride(configs["vae"])
    size = image_size or int(configs["unet"]["sample_size"]) * stride
    networks = build_networks(
        {**configs["unet"], "sample_size": size // stride},
        {**configs["vae"], "sample_size": size},
        configs["text_encoder"],
        stem_channels,
    )
    on_phase(CHECKING)
    for part in _NETWORKS:
        tensors = read_weights(folder / part)
        check_types(tensors, folder / part)
        rename, name_again = (_rename, _port_name) if part == "controlnet" else (str, str)
        renamed = {rename(name): value for name, value in tensors.items()}
        names = {ours: name_again(ours) for ours in (*networks[part].state_dict(), *renamed)}
        fill_network(networks[part], renamed, names, folder / part)
        check_values(tensors, folder / part)
    fitted = fit_tokenizer(tokenizer or read_tokenizer(folder / "tokenizer"), *_text_limits(configs["text_encoder"]))
    on_phase(DIGESTING)
    report = ImportReport(
        kind="prompt_diffusion",
        source=folder.name,
        sha256=digest_file(find_weights(folder / "controlnet")[0]),
        image_size=size,
        parts=count_parts(networks),
        architecture={name: configs["unet"].get(name) for name in _SHARED} | {"stem_channels": list(stem_channels)},
        left_out=tuple(sorted(path.name for path in folder.iterdir() if path.name not in _READ)),
    )
    on_phase(WRITING)
    with new_folder(out) as place:
        write_model(place, networks, fitted, _build_scheduler(configs["scheduler"]))
    return report


def _check_kind(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for a control model that is none of the port's, or that does not fit the UNet beside it."""
    control, unet = configs["controlnet"], configs["unet"]
    kind = control.get("_class_name")
    if kind == _OUR_CLASS:
        raise ValueError(f"{folder} is a model in this project's own layout already: use it as it is")
    if kind != PORT_CLASS:
        raise ValueError(
            f"{folder / 'controlnet'} holds {kind!r}, not {PORT_CLASS!r}: it has no stem for an example pair"
        )
    if control.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise ValueError(f"{folder / 'controlnet'} reads its conditions in another order of colours than RGB")
    for name in _SHARED:
        if control.get(name) != unet.get(name):
            raise ValueError(f"{folder}: its control model has {name} {control.get(name)}, its UNet {unet.get(name)}")


def _rename(name: str) -> str:
    for theirs, ours in _STEMS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"trunk.{name}"


def _port_name(ours: str) -> str:
    for theirs, stem in _STEMS.items():
        if ours.startswith(stem):
            return theirs + ours.removeprefix(stem)
    return ours.removeprefix("trunk.")


def _text_limits(config: Mapping[str, Any]) -> tuple[int, int]:
    return int(config["vocab_size"]), int(config["max_position_embeddings"])


def _build_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """Keep the noise schedule, and sample as the original code does: the port's saved sampler differs from it."""
    return build_scheduler(
        str(config.get("beta_schedule", "scaled_linear")),
        float(config.get("beta_start", PUBLISHED_BETAS[0])),
        float(config.get("beta_end", PUBLISHED_BETAS[1])),
        int(config.get("num_train_timesteps", 1000)),
        str(config.get("prediction_type", "epsilon")),
    )
