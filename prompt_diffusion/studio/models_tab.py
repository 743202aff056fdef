"""The tab Models: every registered version with what was measured of it, and its card."""

from typing import Any

import gradio as gr

from prompt_diffusion.registry import ModelVersionSummary
from prompt_diffusion.studio.models import ModelShelf
from prompt_diffusion.studio.toasts import toast_errors

_COLUMNS = ("model", "version", "aliases", "registered (UTC)", "title", "vision tasks")


def build_models_tab(shelf: ModelShelf, page: gr.Blocks) -> None:
    """Draw the tab; the table is read anew when the page is opened and when asked."""
    note = gr.Markdown("")
    table = gr.Dataframe(
        headers=list(_COLUMNS), label="Registered versions", interactive=False, wrap=True, elem_id="versions"
    )
    refresh = gr.Button("Read again", size="sm")
    card = gr.Markdown("Click a row to see its card.", container=True, elem_id="card")
    versions = gr.State(())

    def read() -> list[Any]:
        try:
            found = shelf.list_versions()
        except ValueError as error:
            return [f"{error}", gr.Dataframe(value=[], headers=list(_COLUMNS)), ()]
        headers, rows = tabulate(found)
        note = "Metrics are the benchmark's: lower is better." if found else "No model is registered yet."
        return [note, gr.Dataframe(value=rows, headers=headers), tuple(found)]

    @toast_errors
    def show(found: tuple[ModelVersionSummary, ...], event: gr.SelectData) -> str:
        return render_card(found[event.index[0]])

    page.load(read, outputs=[note, table, versions], api_visibility="private")
    refresh.click(read, outputs=[note, table, versions], api_visibility="private")
    table.select(show, versions, card, api_visibility="private")


def tabulate(versions: list[ModelVersionSummary]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows: a column for each metric that any version has."""
    metrics = list(dict.fromkeys(name for version in versions for name in version.metrics))
    rows = [
        [
            version.name,
            version.version,
            ", ".join(version.aliases),
            f"{version.created:%Y-%m-%d %H:%M}",
            version.title,
            str(len(version.vision_tasks) or ""),
            *(f"{version.metrics[name]:.3f}" if name in version.metrics else "" for name in metrics),
        ]
        for version in versions
    ]
    return [*_COLUMNS, *(name.replace("/", " ").replace("_to_", " → ") for name in metrics)], rows


def render_card(version: ModelVersionSummary) -> str:
    """Return what the registry knows of a version as Markdown."""
    facts = {
        "load as": f"`{version.uri}`",
        "aliases": ", ".join(version.aliases) or "none",
        "where it came from": version.source or "not said",
        "fingerprint": f"`{version.fingerprint}`",
        "vision tasks": ", ".join(version.vision_tasks) or "not said",
    }
    lines = [f"### {version.name}, version {version.version}", version.title]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- licence of {part}: {licence}" for part, licence in version.licences.items()]
    lines += [f"- {name}: {value:.4g}" for name, value in version.metrics.items()]
    return "\n".join(lines)
