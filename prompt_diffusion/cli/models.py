"""Registered models on the command line: list their versions, promote one."""

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prompt_diffusion.cli.shared import JsonOption, say_errors

if TYPE_CHECKING:
    from prompt_diffusion.registry import ModelVersionSummary

_WIDE = 100  # columns of a terminal with room for a version's title beside the numbers of six vision tasks
_FEW = 4  # with fewer metrics than this, a title fits in any terminal
# A metric's title above its column; the rest of its name is the vision task: rmse/image_to_depth.
_MEASURES = {"rmse": "RMSE", "frechet_distance": "Fréchet", "FID": "FID", "FID_legacy": "FID (legacy)"}


@say_errors
def models(
    name: Annotated[str | None, typer.Argument(help="A registered model; default: all of them.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the versions of registered models with their measurements, newest first.

    Example: prompt-diffusion models prompt-diffusion --json
    """
    from prompt_diffusion.registry import list_versions
    from prompt_diffusion.settings import load_settings

    versions = list_versions(load_settings(), name)
    if as_json:
        print(json.dumps([version.model_dump(mode="json") for version in versions], indent=2))
        return
    console = Console(highlight=False)
    for model, group in groupby(sorted(versions, key=lambda version: version.name), key=lambda version: version.name):
        console.print(_tabulate(model, list(group), is_wide=console.width >= _WIDE))
    if not versions:
        console.print("No model has been registered yet: prompt-diffusion train makes one.")
    elif any(version.metrics for version in versions):
        console.print("Lower is better. Fréchet: distance of EfficientNet features, not FID; RMSE: maps in [0, 1].")


@say_errors
def promote(
    reference: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    alias: Annotated[str, typer.Option(help="The alias that it gets.")] = "champion",
) -> None:
    """Point an alias at a version: the champion is what others load.

    Example: prompt-diffusion promote models:/prompt-diffusion@challenger
    """
    from prompt_diffusion.registry import list_versions, set_alias
    from prompt_diffusion.settings import load_settings

    settings = load_settings()
    promoted = set_alias(reference, alias, settings)
    aliases = next(v.aliases for v in list_versions(settings, promoted.name) if v.version == promoted.version)
    print(f"{promoted.uri} is now {', '.join(aliases)}: load it as models:/{promoted.name}@{alias}")


def _tabulate(model: str, versions: "list[ModelVersionSummary]", is_wide: bool) -> Table:
    """Return the table of one registered model: one row per version, one column per metric, the best of each in bold."""
    metrics = sorted({metric for version in versions for metric in version.metrics})
    best = {metric: min(v.metrics[metric] for v in versions if metric in v.metrics) for metric in metrics}
    with_titles = is_wide or len(metrics) < _FEW
    padding = (0, 1, 0, 0) if with_titles else 0
    grid = Table(box=box.SIMPLE_HEAD, title=model, title_justify="left", title_style="bold", padding=padding)
    grid.add_column("", justify="right", no_wrap=True)
    grid.add_column("alias", no_wrap=True)
    grid.add_column("date", no_wrap=True)
    if with_titles:
        grid.add_column("model")
    for metric in metrics:
        grid.add_column(_head(metric), justify="right", no_wrap=True)
    for version in versions:
        numbers = [
            f"[bold]{version.metrics[metric]:.3g}[/bold]"
            if version.metrics.get(metric) == best[metric] and len(versions) > 1
            else f"{version.metrics[metric]:.3g}"
            if metric in version.metrics
            else "-"
            for metric in metrics
        ]
        aliases = "\n".join(version.aliases) or "-"
        date = version.created.astimezone().strftime("%Y-%m-%d")
        title = [escape(version.title or version.source or "-")] if with_titles else []
        grid.add_row(version.version, escape(aliases), date, *title, *numbers)
    return grid


def _head(metric: str) -> str:
    """Return a metric's name in three narrow lines: the measure, and where the vision task leads from and to."""
    measure, _, task = metric.partition("/")
    source, _, target = task.partition("_to_")
    lines = [_MEASURES.get(measure, measure), f"{source} →" if target else source.replace("_", " "), target]
    return escape("\n".join(line for line in lines if line))
