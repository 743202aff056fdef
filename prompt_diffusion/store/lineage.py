"""From a sealed manifest back to everything that it was made from: the one walk that reports, registry and commands share."""

from collections.abc import Iterator
from dataclasses import dataclass

from prompt_diffusion.store.fingerprint import StageInput
from prompt_diffusion.store.manifest import Manifest, UnsealedError, open_manifest
from prompt_diffusion.store.uris import join_uri


@dataclass(frozen=True, slots=True)
class Ancestor:
    """Something that a sealed output was made from, directly or through other stages."""

    path: tuple[str, ...]
    """The roles that lead to it, from the output back."""
    input: StageInput
    """Its role in the stage that read it, its own stage, and its content."""
    manifest: Manifest | None
    """The sealed manifest; None for what no stage made, and for what its store no longer has."""


def open_input(manifest: Manifest, role: str) -> Manifest:
    """Open the sealed input in a role, in the store that holds the manifest itself.

    ValueError where the stage has no sealed input in that role, UnsealedError where the store no longer has it.
    """
    found = manifest.identity.find_input(role)
    if found is None or found.stage is None:
        roles = ", ".join(each.role for each in manifest.identity.inputs if each.stage is not None)
        raise ValueError(f"{manifest.ref.uri} has no sealed input {role!r}, only {roles or 'none'}")
    return open_manifest(join_uri(manifest.store_root, found.stage, found.fingerprint))


def list_inputs(manifest: Manifest) -> Iterator[Ancestor]:
    """Yield what a sealed output was made from directly, in the order of the roles' names."""
    for each in manifest.identity.inputs:
        yield Ancestor((each.role,), each, _find(manifest.store_root, each))


def walk_lineage(manifest: Manifest) -> Iterator[Ancestor]:
    """Yield everything that a sealed output was made from, each sealed manifest once, those nearest to the output first."""
    seen: set[tuple[str | None, str]] = set()
    queue = list(list_inputs(manifest))
    while queue:
        ancestor = queue.pop(0)
        key = (ancestor.input.stage, ancestor.input.fingerprint)
        if key in seen:
            continue
        seen.add(key)
        yield ancestor
        if ancestor.manifest is not None:
            queue += [
                Ancestor((*ancestor.path, *further.path), further.input, further.manifest)
                for further in list_inputs(ancestor.manifest)
            ]


def _find(store_root: str, each: StageInput) -> Manifest | None:
    if each.stage is None:
        return None
    try:
        return open_manifest(join_uri(store_root, each.stage, each.fingerprint))
    except UnsealedError:  # a store that the input was not copied to
        return None
