"""A model's networks built without memory and filled from mapped tensors, and a folder that appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prompt_diffusion.building import builds_networks
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.original.read import name_some
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

# the published evaluation: how an imported model samples where a call does not say
PUBLISHED_STEPS = 100
PUBLISHED_GUIDANCE = 9.0
RELEASED_IMAGE_SIZE = 256
BASE_IMAGE_SIZE = 512


OnPhase = Callable[[str], None]
"""Called with what begins now; an import and an export have three phases."""
CHECKING, DIGESTING, WRITING = "checking every weight", "computing the digest", "writing the model"


def tell_nobody(phase: str) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class ImportReport:
    """What an import made, and where each tensor of the source went."""

    kind: str
    """``prompt_diffusion`` or ``base``."""
    source: str
    """Name of the file or folder that was read."""
    sha256: str
    """Digest of the file, or of the control model's file in a folder."""
    image_size: int
    """Side of the images that the model works at by default, in pixels."""
    parts: dict[str, dict[str, int]]
    """Tensors and parameters by part."""
    architecture: dict[str, Any]
    """What was read from the tensors' shapes."""
    buffers: tuple[str, ...] = ()
    """Tensors of the source that are not weights: computed again where they are needed."""
    left_out: tuple[str, ...] = ()
    """What else the source holds, and was not taken over."""


@builds_networks
def build_networks(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any], stem_channels: Sequence[int] | None
) -> dict[str, Any]:
    """Return the networks of a base, and a ControlNet where there are stems, on the meta device: shapes without memory."""
    with torch.device("meta"):
        networks = {
            "vae": AutoencoderKL.from_config(dict(vae)),
            "unet": UNet2DConditionModel.from_config(dict(unet)),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
        if stem_channels is not None:
            networks["controlnet"] = PromptDiffusionControlNet.from_unet(networks["unet"], tuple(stem_channels))
    return networks


def fill_network(
    network: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None = None, source: object = "it"
) -> None:
    """Fill a network with its tensors, without a copy; ``names`` are the source's by the network's, to be named in errors.

    ValueError names tensors that are missing, unused, or of another shape.
    """
    said = names or {}
    expected = network.state_dict()
    missing = [said.get(name, name) for name in expected if name not in tensors]
    unused = [said.get(name, name) for name in tensors if name not in expected]
    if missing or unused:
        raise ValueError(f"{source} {describe_keys(missing, unused)}")
    wrong = [
        f"{said.get(name, name)} {list(tensors[name].shape)} in place of {list(value.shape)}"
        for name, value in expected.items()
        if tensors[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{source} has tensors of other shapes than its architecture's: {name_some(wrong)}")
    network.load_state_dict(tensors, strict=True, assign=True)
    network.eval().requires_grad_(False)


def describe_keys(missing: list[str], unused: list[str]) -> str:
    """Say which tensors a source lacks, and which it has that nothing uses."""
    sentences = []
    if missing:
        sentences.append(f"lacks {name_some(missing)}")
    if unused:
        sentences.append(f"has tensors that the model has no place for: {name_some(unused)}")
    return "; and ".join(sentences)


def count_parts(networks: Mapping[str, nn.Module]) -> dict[str, dict[str, int]]:
    """Return the number of tensors and parameters of each network."""
    states = {name: network.state_dict() for name, network in networks.items()}
    return {
        name: {"tensors": len(state), "parameters": sum(value.numel() for value in state.values())}
        for name, state in states.items()
    }


def write_model(folder: Path, networks: Mapping[str, Any], tokenizer: CLIPTokenizer, scheduler: DDIMScheduler) -> None:
    """Write a pipeline, or a base where there is no ControlNet, as diffusers does, in the precision of its tensors."""
    if "controlnet" in networks:
        PromptDiffusionPipeline(
            **networks,
            tokenizer=tokenizer,
            scheduler=scheduler,
            default_num_inference_steps=PUBLISHED_STEPS,
            default_guidance_scale=PUBLISHED_GUIDANCE,
        ).save_pretrained(folder)
        return
    for name, network in networks.items():
        network.save_pretrained(folder / name, safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")


def check_free(out: Path) -> None:
    """Raise ValueError where something that must not be overwritten is in a result's place."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is already there: name another place with --out, or remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` that gets its name at the end; if anything fails, nothing of it is left."""
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield place
        place.chmod(0o755)
        place.replace(out)
    except (SafetensorError, RuntimeError) as error:  # how their writers report a full disk
        raise OSError(f"{out} could not be written, is the disk full? ({str(error).splitlines()[0]})") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
