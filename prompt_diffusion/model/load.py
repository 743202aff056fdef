"""Loading a pipeline from a folder in diffusers' layout: safetensors and JSON alone, nothing that it holds is executed."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from prompt_diffusion.building import builds_networks
from prompt_diffusion.device import choose_device
from prompt_diffusion.model.controlnet import PromptDiffusionControlNet
from prompt_diffusion.model.pipeline import PromptDiffusionPipeline
from prompt_diffusion.model.schedulers import check_scheduler
from prompt_diffusion.model.tokenizers import check_sizes, check_tokenizer, load_tokenizer

_INDEX = "model_index.json"
_DEFAULTS = ("default_num_inference_steps", "default_guidance_scale", "default_image_size")
_NETWORKS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "unet": UNet2DConditionModel,
    "controlnet": PromptDiffusionControlNet,
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PARTS = (*_NETWORKS, "tokenizer", "scheduler")


@builds_networks
def load_pipeline(
    folder: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = torch.float32
) -> PromptDiffusionPipeline:
    """Load a pipeline, with any of diffusers' schedulers, from a folder that ``save_pretrained`` wrote.

    ``device`` may be ``auto``; ``dtype`` is a type of torch, or its name such as ``float16``.

    ValueError, in one sentence, names the part that is missing, damaged or of another class, and the tensor that is not finite.
    """
    folder = Path(folder)
    chosen, dtype = choose_device(str(device)), _read_dtype(dtype)  # before anything is read
    _check_parts(folder)
    parts: dict[str, Any] = {name: _load_network(folder, name, dtype) for name in _NETWORKS}
    parts["tokenizer"] = _load_tokenizer(folder)
    check_tokenizer(parts["tokenizer"], parts["text_encoder"], str(folder))
    parts["scheduler"] = _load_scheduler(folder)
    index = _read_json(folder / _INDEX)
    defaults = {name: index[name] for name in _DEFAULTS if name in index}
    pipeline: PromptDiffusionPipeline = PromptDiffusionPipeline(**parts, **defaults).to(chosen)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in _DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in _DTYPES)
        raise ValueError(f"dtype is one of {names}, as a type of torch or its name, got {dtype!r}")
    return found


def _check_parts(folder: Path) -> None:
    missing = [name for name in _PARTS if not (folder / name).is_dir()]
    if not (folder / _INDEX).is_file():
        missing.append(_INDEX)
    if missing:
        raise ValueError(
            f"{folder} is no Prompt Diffusion pipeline: it has no {', '.join(missing)}; copy the whole folder that "
            "save_pretrained wrote"
        )


def _load_network(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    kind = _NETWORKS[name]
    config = _read_json(folder / name / "config.json")
    found = config.get("_class_name") or next(iter(config.get("architectures") or [None]))
    if found != kind.__name__:
        raise ValueError(f"{folder / name} holds a {found}, but the {name} of a pipeline is a {kind.__name__}")
    try:
        network, info = kind.from_pretrained(
            folder / name, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} has no {name} that can be loaded ({str(error).splitlines()[0]})") from error
    if info["missing_keys"]:
        raise ValueError(f"{folder / name} lacks weights: there is no {sorted(info['missing_keys'])[0]}")
    _check_finite(network, f"{folder / name}")
    network.eval().requires_grad_(False)
    loaded: nn.Module = network
    return loaded


def _check_finite(network: nn.Module, where: str) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{where} has NaN or infinite values in {name}: the file is damaged, or its training diverged; take another "
                "version of the model"
            )


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return load_tokenizer(folder / "tokenizer")
    except ValueError as error:
        raise ValueError(f"{folder} has no tokenizer that can be loaded ({error})") from error


def _load_scheduler(folder: Path) -> SchedulerMixin:
    """Return the scheduler of the class that its configuration names, if it is diffusers' own and for noise predictions."""
    path = folder / "scheduler"
    found = _read_json(path / "scheduler_config.json").get("_class_name")
    kind = getattr(diffusers, str(found), None)
    # SchedulerMixin itself, and what diffusers exports in place of a scheduler whose package is missing, cannot take a step.
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin) and hasattr(kind, "step")):
        raise ValueError(
            f"{path} names {found!r}, which is no scheduler of diffusers {diffusers.__version__}: save the pipeline with one, "
            "such as DDIMScheduler"
        )
    load: Any = kind
    try:
        scheduler: SchedulerMixin = load.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} holds no {found} that can be loaded ({reason})") from error
    check_scheduler(scheduler)
    return scheduler


def _read_json(path: Path) -> dict[str, Any]:
    try:
        check_sizes(path.parent)
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
