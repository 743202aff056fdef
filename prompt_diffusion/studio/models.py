"""The models that the page offers, and the one that is loaded: a new one replaces it."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_diffusion.generation import OpenModel, identify_model, open_model
from prompt_diffusion.registry import ModelVersionSummary, list_versions
from prompt_diffusion.registry.versions import find_version, say_registry
from prompt_diffusion.settings import Settings


class ModelShelf:
    """Lists registered versions and keeps one model loaded, lent to one caller at a time."""

    def __init__(self, settings: Settings, first: str, device: str, takes_folders: bool) -> None:
        self._settings, self._first, self._device = settings, first, device
        self._takes_folders = takes_folders
        self._lock = threading.Lock()
        self._loaded: OpenModel | None = None
        self._key = ""

    def list_versions(self) -> list[ModelVersionSummary]:
        """Return all registered versions, newest first; ValueError where the registry does not answer."""
        return list_versions(self._settings)

    def read_card(self, version: ModelVersionSummary) -> str:
        """Return the model card of a version, Markdown; ValueError where the registry does not answer."""
        with say_registry(self._settings) as client:
            return str(find_version(client, version.uri).description or "")

    def list_choices(self) -> list[tuple[str, str]]:
        """Return (label, reference) of what can be chosen: what the page was started with, then every version."""
        try:
            versions = self.list_versions()
        except ValueError:  # the Models tab says why; a folder can be used all the same
            versions = []
        choices = [(self._first, self._first)]
        for version in versions:
            names = f" ({', '.join(version.aliases)})" if version.aliases else ""
            choices.append((f"{version.name}, version {version.version}{names}", version.uri))
        return choices

    @contextmanager
    def borrow(self, reference: str) -> Iterator[OpenModel]:
        """Yield the model for the duration of the block, loading it if another one is loaded.

        A one-sentence ValueError if it cannot be loaded.
        """
        is_registered = reference.startswith("models:/")
        if not (is_registered or self._takes_folders or reference == self._first):
            raise ValueError("this page accepts only registered models: choose one from the list")
        with self._lock:
            identity = identify_model(reference, self._settings)
            if self._loaded is None or self._key != identity.place:
                self._drop()
                self._loaded, self._key = open_model(reference, self._settings, self._device), identity.place
            yield self._loaded

    def _drop(self) -> None:
        """Free the memory of the loaded model before another one is loaded."""
        if self._loaded is None:
            return
        import torch

        self._loaded, self._key = None, ""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
