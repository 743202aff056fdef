"""What a user's word for a device stands for on this machine."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def settle_device(device: "str | int | torch.device") -> str:
    """Return the torch device: ``auto`` takes a GPU where there is one; ValueError where this machine has none of that kind."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):  # torch's own messages name its build, not the way out
        raise ValueError(f"device {device!r} cannot be used on this machine: use 'cpu' or 'auto'") from None
    return str(torch.device(device))
