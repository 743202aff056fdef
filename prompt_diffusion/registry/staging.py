"""The files of a pipeline that are registered: of a sealed training or of a folder, listed and put in place."""

from pathlib import Path

from prompt_diffusion.model.references import PIPELINE_FOLDER
from prompt_diffusion.registry.cache import is_read, link_or_copy
from prompt_diffusion.store.digest import digest_file
from prompt_diffusion.store.manifest import Manifest
from prompt_diffusion.store.uris import local_path


def list_training(manifest: Manifest) -> dict[str, str]:
    """Return the digests, by path, of the files in a training's pipeline that the loader reads."""
    prefix = f"{PIPELINE_FOLDER}/"
    found = {file.path.removeprefix(prefix): file.sha256 for file in manifest.files if file.path.startswith(prefix)}
    return {path: sha256 for path, sha256 in found.items() if is_read(path)}


def stage_training(manifest: Manifest, root: Path) -> None:
    """Put a training's pipeline below ``root``, checked.

    From a store on this machine the files are hard-linked, not copied; from another they are fetched.
    """
    store = local_path(manifest.ref.uri)
    if store is None:
        folder = manifest.fetch_folder(PIPELINE_FOLDER, root.with_name("fetched"))
        root.mkdir(parents=True)
        folder.rename(root / PIPELINE_FOLDER)
        return
    for name, sha256 in list_training(manifest).items():
        path = f"{PIPELINE_FOLDER}/{name}"
        link_or_copy(store / path, root / path)
        if digest_file(root / path) != sha256:
            manifest.read_file(path)  # raises an error that says what is wrong, and the remedy


def list_folder(folder: Path) -> list[str]:
    """Return the paths of the files to load: neither pickles nor other precisions; ValueError if this is not a pipeline."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one that holds a pipeline in diffusers' layout")
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = sorted(filter(is_read, found))
    for part in ("controlnet", "unet", "vae", "text_encoder"):
        if not any(path.startswith(f"{part}/") and path.endswith(".safetensors") for path in paths):
            raise ValueError(f"{folder} holds no Prompt Diffusion pipeline: it has no {part} with safetensors weights")
    return paths
