"""The command line, ``prompt-diffusion``: every command is one call into the library or a flow."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from prompt_diffusion import __version__
from prompt_diffusion.cli.annotators import annotate, annotators_app, weights_app
from prompt_diffusion.cli.checkpoints import export_checkpoint, import_checkpoint
from prompt_diffusion.cli.generation import PairsCommand, edit, generate, settings
from prompt_diffusion.cli.models import models, promote
from prompt_diffusion.cli.screen import show_run
from prompt_diffusion.cli.shared import (
    JsonOption,
    OverridesOption,
    PresetOption,
    StoreOption,
    VerboseOption,
    need_flows,
    parse_overrides,
    say_errors,
)
from prompt_diffusion.cli.studio import studio
from prompt_diffusion.cli.training import train

if TYPE_CHECKING:
    from prompt_diffusion.evaluation.table import BenchmarkTable

app = typer.Typer(
    name="prompt-diffusion",
    help="Prompt Diffusion: one model learns a vision task from an example pair.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
USE, MAKE, INSPECT = "Use a model", "Train and evaluate", "Inspect"
app.command(cls=PairsCommand, rich_help_panel=USE)(generate)
app.command(rich_help_panel=USE)(edit)
app.command(rich_help_panel=USE)(annotate)
app.command(rich_help_panel=USE)(studio)
app.command(rich_help_panel=USE)(import_checkpoint)
app.command(rich_help_panel=USE)(export_checkpoint)
app.command(rich_help_panel=MAKE)(train)
app.command(rich_help_panel=MAKE)(promote)
app.add_typer(weights_app, name="weights", rich_help_panel=MAKE)
app.command(rich_help_panel=INSPECT)(models)
app.command(rich_help_panel=INSPECT)(settings)
app.add_typer(annotators_app, name="annotators", rich_help_panel=INSPECT)


@app.command(rich_help_panel=MAKE)
@say_errors
def demo(
    preset: PresetOption = "demo",
    overrides: OverridesOption = None,
    store: StoreOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run everything, dataset to table: ingest, annotate, train, baselines, register, benchmark; finished stages are kept.

    Example: prompt-diffusion demo --set train.num_steps=900
    """
    with need_flows():
        from flows.embedded import reproduce_here
        from flows.run import start_run

    # waiting threads sleep instead of spinning, which costs far more on a shared machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run = start_run(preset, parse_overrides(overrides or []), store)
    with show_run(Path("outputs/demo.log"), is_verbose=verbose) as terminal:
        ref = reproduce_here(run, Path("outputs/prefect"), terminal)
    from prompt_diffusion.evaluation.findings import list_findings
    from prompt_diffusion.evaluation.table import read_table

    found = read_table(ref.uri)
    show_table(found, as_json=False)
    print("What it says:")
    for finding in list_findings(found):
        print(f"- {finding}")
    print(_GOING_ON.format(report=f"{ref.uri}/report.html"))


_GOING_ON = """
Go on from here:
  open the report       {report}
  try it in a browser   prompt-diffusion studio
  see the table again   prompt-diffusion table"""


def show_table(table: "BenchmarkTable", as_json: bool) -> None:
    """Print a table as JSON, or for a terminal."""
    if as_json:
        print(table.model_dump_json(indent=2))
        return
    from prompt_diffusion.evaluation.table import build_rows, describe_measure, name_outcome, name_task

    grid = Table(box=box.SIMPLE_HEAD)
    grid.add_column("lower is better")
    for task in table.vision_tasks:
        grid.add_column(name_task(task).replace(" → ", "\n→ "), justify="right", no_wrap=True)
    kind = "measured"
    for row in build_rows(table):
        if row.kind != kind:
            grid.add_section()
            kind = row.kind
        texts = [f"[bold]{text}[/bold]" if best else text for text, best in zip(row.texts, row.is_best, strict=True)]
        grid.add_row(row.title, *texts)
    outcomes = Table(box=box.SIMPLE_HEAD, title="With no text: which map came out", title_justify="left")
    outcomes.add_column("pair shown")
    for label in table.in_context.labels:
        outcomes.add_column(name_outcome(label), justify="right")
    for label, counts in zip(table.in_context.labels, table.in_context.confusion, strict=True):
        outcomes.add_row(label.replace("hed", "HED"), *map(str, counts))
    console = Console(highlight=False)
    created = str(table.provenance.get("created", "an unknown time")).partition(".")[0]
    console.print(f"The table of training {table.training or '(unknown)'}, made at {created}.")
    console.print(grid)
    for measure in sorted({describe_measure(cell) for cell in table.cells}):
        console.print(f"Measured here: {measure}.")
    console.print(
        "The paper's: FID (Inception) and RMSE on InstructPix2Pix at 256 px; its FID is comparable to no other distance.\n"
    )
    console.print(outcomes)


@app.command(rich_help_panel=INSPECT)
@say_errors
def table(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Whose table: models:/NAME/VERSION, or a training's fingerprint; default: the newest table."
        ),
    ] = None,
    as_json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Print a benchmark table: the newest, or the one of a model.

    Example: prompt-diffusion table models:/prompt-diffusion@champion
    """
    from prompt_diffusion.evaluation.table import find_newest_table
    from prompt_diffusion.settings import load_settings

    settings = load_settings()
    training = model
    if model is not None and model.startswith("models:/"):
        from prompt_diffusion.generation.model import identify_model

        training = identify_model(model, settings).fingerprint
    show_table(find_newest_table(store or settings.store, training), as_json)


@app.command(rich_help_panel=INSPECT)
@say_errors
def manifest(
    uri: Annotated[str, typer.Argument(help="A sealed folder: {store}/{stage}/{fingerprint}.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of its images to this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a sealed manifest holds.

    Example: prompt-diffusion manifest outputs/store/ingest/0f3a... --sheet pairs.png
    """
    from prompt_diffusion.store.describe import describe_manifest, render_contact_sheet

    description = describe_manifest(uri)
    if as_json:
        print(description.model_dump_json(indent=2))
    else:
        _print_description(description.model_dump(mode="json"))
    if sheet is not None:
        sheet.write_bytes(render_contact_sheet(uri))
        print(f"contact sheet: {sheet}", file=sys.stderr)


def _print_description(content: dict[str, Any]) -> None:
    files = content.pop("files")
    total = sum(file["bytes"] for file in files)
    for name, value in content.items():
        if isinstance(value, dict) and value:
            print(f"{name}:")
            for key, inner in value.items():
                print(f"  {key}: {inner if isinstance(inner, str) else json.dumps(inner)}")
        elif value:
            print(f"{name}: {value}")
    print(f"files: {len(files)}, {total / 1e6:.1f} MB")
    for file in files[:20]:
        print(f"  {file['path']}  {file['rows']} rows  {file['bytes']} bytes  sha256 {file['sha256'][:12]}")
    if len(files) > 20:
        print(f"  and {len(files) - 20} more")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"prompt-diffusion {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Prompt Diffusion: one model learns a vision task from an example pair."""


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # there would be one for each file of weights
    try:
        app()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
