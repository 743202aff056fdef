"""The commands ``import-checkpoint`` and ``export-checkpoint``."""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prompt_diffusion.cli.progress import show_phases
from prompt_diffusion.cli.shared import JsonOption, StoreOption, say_errors

if TYPE_CHECKING:
    from prompt_diffusion.model.original.parts import ImportReport
    from prompt_diffusion.settings import Settings

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_FILE_ENDINGS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")


@say_errors
def import_checkpoint(
    source: Annotated[
        str,
        typer.Argument(
            help="A .ckpt or .safetensors file in the original layout (the released weights, or SD v1.5's own as a base), or a "
            "folder or hub's repository of diffusers' port of Prompt Diffusion."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default: here, named as the file. With --register alone none is kept."),
    ] = None,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also make it a version of this registered model.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|REPOSITORY",
            help="The text encoder's tokenizer, which no checkpoint holds; default: SD v1.5's from the store's mirror, else "
            "openai/clip-vit-large-patch14 from the hub; of a folder, its own.",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels a side to work at; default: 256, for a base 512, of a folder its own."),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the UNet, which no checkpoint states.")] = 8,
    text_heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of the text encoder; default: one for 64 channels.")
    ] = None,
    averages: Annotated[
        bool, typer.Option("--averages", help="Take the UNet's moving averages, where a base's file holds both.")
    ] = False,
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Turn released weights into a model that is used from here: checked, every tensor accounted for, nothing executed.

    Example: prompt-diffusion import-checkpoint network-step=04999.ckpt --register released
    """
    from prompt_diffusion.model.original.bundle import import_bundle
    from prompt_diffusion.model.original.convert import import_checkpoint as import_original
    from prompt_diffusion.model.original.convert import open_original
    from prompt_diffusion.model.original.tokenizer import load_tokenizer
    from prompt_diffusion.settings import load_settings

    settings = load_settings()
    root = store or settings.store
    place = _find_source(source, root, settings)
    is_file = place.is_file()
    original = open_original(place, heads, text_heads) if is_file else None
    if register and original is not None and original.kind == "base":
        raise ValueError(f"{place} is a base: it is not registered, but written with --out and named in train.base")
    keeps = register is None or out is not None
    with _scratch(None if keeps else settings.cache_dir) as scratch, show_phases(4 if register else 3) as on_phase:
        folder = out or scratch or Path(place.stem if is_file else f"{place.name}-imported")
        given = load_tokenizer(tokenizer, root, settings.cache_dir) if tokenizer or original else None
        if original is not None and given is not None:
            report = import_original(
                original, folder, given, image_size=image_size, take_averages=averages, on_phase=on_phase
            )
        else:
            report = import_bundle(place, folder, tokenizer=given, image_size=image_size, on_phase=on_phase)
        uri = None
        if register:
            on_phase("registering")
            uri = _register(folder, report, register, settings)
    result = {**asdict(report), "folder": str(folder) if folder != scratch else None, "registered": uri}
    print(json.dumps(result, indent=2) if as_json else _describe(result))


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path | None]:
    """Give a place for a folder that is registered and not kept; None where it is kept."""
    if parent is None:
        yield None
        return
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as place:
        yield Path(place) / "model"


@say_errors
def export_checkpoint(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, or a folder.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, or .ckpt as the original code reads it.")],
    as_json: JsonOption = False,
) -> None:
    """Write a model in the original layout, for the code of the paper's authors and other programs that read it.

    Example: prompt-diffusion export-checkpoint models:/released@challenger --out released.safetensors
    """
    from prompt_diffusion.model.original.export import export_checkpoint as export_folder

    folder = Path(model)
    if not folder.is_dir():
        from prompt_diffusion.registry import fetch
        from prompt_diffusion.settings import load_settings

        folder = fetch(model, load_settings())
    with show_phases(3) as on_phase:
        report = export_folder(folder, out, on_phase)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
        return
    heads = report.architecture["unet"]["num_heads"]
    print(f"{report.file}: {report.weights} weights and {len(report.buffers)} buffers, sha256 {report.sha256}")
    if heads != 8:
        print(
            f"its UNet has {heads} heads, which no file of weights states: the published configuration says 8",
            file=sys.stderr,
        )


def _find_source(source: str, store_root: str, settings: "Settings") -> Path:
    """Return the local file or folder of what is imported: a hub's repository is fetched, or found in the mirror."""
    from prompt_diffusion.model.mirror import find_model
    from prompt_diffusion.model.references import base_folder

    path = Path(source)
    if path.exists() or source.endswith(_FILE_ENDINGS) or not _REPOSITORY.fullmatch(source):
        if not path.exists():
            raise ValueError(f"there is no file or folder {source}")
        return path
    return base_folder(find_model(source, store_root, settings.cache_dir))


def _register(folder: Path, report: "ImportReport", name: str, settings: "Settings") -> str:
    from prompt_diffusion.model.original.provenance import describe_origin
    from prompt_diffusion.registry import ModelFacts, register_folder

    return register_folder(folder, settings, name=name, facts=ModelFacts(**describe_origin(report))).uri


def _describe(result: dict[str, Any]) -> str:
    """Say for a terminal what was imported, and how it is used."""
    what = "Prompt Diffusion" if result["kind"] == "prompt_diffusion" else "a base"
    lines = [f"{result['source']}: {what}, {result['image_size']} pixels a side, sha256 {result['sha256']}"]
    for part, counts in result["parts"].items():
        lines.append(f"  {part}: {counts['tensors']} tensors, {counts['parameters'] / 1e6:.1f} M parameters")
    if result["buffers"]:
        lines.append(f"  no weights, computed again where they are needed: {', '.join(result['buffers'])}")
    if result["left_out"]:
        lines.append(f"  left out: {', '.join(result['left_out'])}")
    if result["folder"]:
        lines.append(f"folder: {result['folder']}")
    if result["registered"]:
        lines.append(f"registered: {result['registered']}")
    if result["kind"] == "base":
        lines.append(f"train on it with --set train.base={result['folder']}")
    return "\n".join(lines)
