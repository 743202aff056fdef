"""Where networks compute: the one place that says what a device's name means here, and refuses one that is not there."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from prompt_diffusion.frozen import FrozenModel

if TYPE_CHECKING:
    import torch

AUTO = "auto"


class DeviceResources(FrozenModel):
    """Resources of a stage whose networks run on one device; no field of them may change what comes out."""

    device: str = AUTO
    """Where networks run: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU where there is one."""

    def on(self, device: str) -> Self:
        """Return the same resources on another device."""
        return self.model_copy(update={"device": device})


def choose_device(device: str, local_rank: int = 0) -> "torch.device":
    """Return the torch device of a setting: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or another that torch knows.

    ``auto`` takes a GPU where there is one. Of several processes on one machine, which are numbered by ``local_rank``, each
    takes a GPU of its own where the setting names no single one. ValueError, in one sentence, where the machine has no such
    device.
    """
    import torch

    name = name_device(device, torch.cuda.device_count() if torch.cuda.is_available() else 0, local_rank)
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen).item()  # asks for an index, which a device without memory ("meta") does not have
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's own messages name its build, not the remedy
        raise refuse(device) from None
    return chosen


def name_device(device: str, num_gpus: int, local_rank: int = 0) -> str:
    """Return the full name of a setting's device, on a machine with that many GPUs."""
    name = ("cuda" if num_gpus else "cpu") if device == AUTO else device
    return f"cuda:{local_rank % num_gpus}" if name == "cuda" and num_gpus else name


def refuse(device: str) -> ValueError:
    """Return the one sentence about a device that this machine does not have."""
    return ValueError(f"device {device!r} cannot be used on this machine: use 'cpu' or 'auto'")


def takes_gpu(device: str) -> bool:
    """Say whether a setting means a GPU on this machine, without loading torch: by the driver's own files."""
    if device == AUTO:
        return any(Path("/dev").glob("nvidia[0-9]*"))
    return device.startswith("cuda")
