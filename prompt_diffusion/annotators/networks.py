"""What all annotator networks share: parameters that must fit, libraries that load quietly, maps on their way out."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prompt_diffusion.annotators.base import ImageBatch
from prompt_diffusion.annotators.weights import Arrays

logger = logging.getLogger(__name__)


def load_parameters(network: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Fill a network for inference; ValueError names the weights and the first parameter that does not fit."""
    expected = network.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        ours = tuple(expected[key].shape) if key in expected else None
        theirs = tuple(tensors[key].shape) if key in tensors else None
        if ours != theirs:
            raise ValueError(f"weights {name} do not fit the network: {key} is {theirs} there and {ours} here")
    network.load_state_dict(tensors)
    network.eval().requires_grad_(False)


def load_transformer(model_class: Any, config: Any, arrays: Arrays, name: str) -> Any:  # noqa: ANN401 - any model of theirs
    """Return a model of transformers, filled as that library fills it: it knows the names that older files use.

    ValueError names the weights and the first parameter that is missing or of another shape; what the file has beyond the
    network (a text encoder for training) is only logged.
    """
    from transformers.utils import logging as their_logging

    verbosity = their_logging.get_verbosity()
    their_logging.set_verbosity(their_logging.CRITICAL)
    their_logging.disable_progress_bar()
    try:
        network, report = model_class.from_pretrained(
            None, config=config, state_dict=to_tensors(arrays), output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        their_logging.set_verbosity(verbosity)
        their_logging.enable_progress_bar()
    # Unused in inference, and not in every file: how many batches a normalisation has seen, and the loss's parameters.
    needed = (key for key in report["missing_keys"] if not key.endswith("num_batches_tracked"))
    missing = sorted(key for key in needed if not key.startswith("criterion."))
    for key in missing:
        raise ValueError(f"weights {name} do not fit {model_class.__name__}: {key} is missing there")
    for key, theirs, ours in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"weights {name} do not fit {model_class.__name__}: {key} is {tuple(theirs)} there and {tuple(ours)} here"
        )
    unused = sorted(report["unexpected_keys"])
    if unused:
        logger.info("weights %s: %d parameters are not used, the first %s", name, len(unused), unused[0])
    return network.eval().requires_grad_(False)


def to_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Return named arrays as tensors in memory of torch's own, whose alignment a CPU's kernels are made for."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)).clone()
        for name, array in arrays.items()
    }


@contextmanager
def import_quietly() -> Iterator[None]:
    """Silence, for the block, what a library says about its own imports (all of controlnet-aux comes with any of it)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def to_device(images: ImageBatch, device: str) -> Tensor:
    """Return uint8 N,3,H,W on the device, of uint8 N,H,W,3."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)


def to_maps(levels: Tensor) -> ImageBatch:
    """Return grey levels N,H,W or colours N,H,W,3, from 0 to 255, as uint8 N,H,W,3: truncated, as by numpy's cast."""
    pixels = levels.clamp(0, 255).to(torch.uint8)
    pixels = pixels.unsqueeze(-1).expand(-1, -1, -1, 3) if pixels.ndim == 3 else pixels
    maps: ImageBatch = pixels.contiguous().cpu().numpy()
    return maps
