"""From a reference to a model that requests can run on, and to the name that a result may carry."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.device import AUTO, choose_device
from prompt_diffusion.registry import load
from prompt_diffusion.registry.versions import SCHEME, find_version, say_registry
from prompt_diffusion.settings import Settings
from prompt_diffusion.tracking.client import FINGERPRINT_TAG

if TYPE_CHECKING:
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model a reference names now; an alias may name another one tomorrow."""

    place: str
    """What ``load`` takes: a registered version, a folder, or a hub's repository."""
    name: str
    """What names it in a result: as ``place``, but for a folder only its own name."""
    fingerprint: str | None
    """A registered model's fingerprint."""


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A loaded model; its pipeline is used by one caller at a time."""

    pipeline: "PromptDiffusionPipeline"
    identity: ModelIdentity


def identify_model(reference: str, settings: Settings) -> ModelIdentity:
    """Return which model a reference names; ValueError, in one sentence, where the registry has no such model."""
    if not reference.startswith(SCHEME):
        name = Path(reference).resolve().name if Path(reference).is_dir() else reference
        return ModelIdentity(reference, name, None)
    with say_registry(settings) as client:
        version = find_version(client, reference)
    exact = f"{SCHEME}{version.name}/{version.version}"
    return ModelIdentity(exact, exact, version.tags.get(FINGERPRINT_TAG))


def open_model(reference: str, settings: Settings, device: str = AUTO) -> OpenModel:
    """Load a model, on a GPU where ``device`` is ``auto`` and there is one; ValueError as the registry's ``load`` raises it."""
    chosen = choose_device(device)
    identity = identify_model(reference, settings)
    return OpenModel(load(identity.place, settings, str(chosen)), identity)
