"""The tab Models: every registered version with what was measured of it, and its card."""

from typing import Any

import gradio as gr

from prompt_diffusion.registry import ModelVersionSummary
from prompt_diffusion.studio.models import ModelShelf
from prompt_diffusion.studio.toasts import toast_errors

_COLUMNS = ("model", "version", "aliases", "registered (UTC)", "title", "vision tasks")

_MEASURES = {"frechet_distance": "Fréchet", "rmse": "RMSE"}


def build_models_tab(shelf: ModelShelf, page: gr.Blocks) -> None:
    """Draw the tab; the table is read anew when the page is opened and when asked."""
    note = gr.Markdown("")
    table = gr.Dataframe(
        headers=list(_COLUMNS), label="Registered versions", interactive=False, wrap=False, elem_id="versions"
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
        row = event.index[0] if isinstance(event.index, list | tuple) and event.index else None
        if not isinstance(row, int) or not 0 <= row < len(found):
            raise ValueError("there is no such version in the list: read it again")
        version = found[row]
        return shelf.read_card(version) or render_facts(version)

    page.load(read, outputs=[note, table, versions], api_visibility="private")
    refresh.click(read, outputs=[note, table, versions], api_visibility="private")
    table.select(show, versions, card, api_visibility="private")


def tabulate(versions: list[ModelVersionSummary]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows: of the columns, those that any version fills, and one for each metric."""
    metrics = list(dict.fromkeys(name for version in versions for name in version.metrics))
    rows = [
        {
            "model": version.name,
            "version": version.version,
            "aliases": ", ".join(version.aliases),
            "registered (UTC)": f"{version.created:%Y-%m-%d %H:%M}",
            "title": version.title,
            "vision tasks": str(len(version.vision_tasks) or ""),
            **{_name_metric(name): f"{version.metrics[name]:.3g}" for name in metrics if name in version.metrics},
        }
        for version in versions
    ]
    columns = [*_COLUMNS, *map(_name_metric, metrics)]
    filled = [column for column in columns if any(row.get(column) for row in rows)]
    return filled, [[row.get(column, "") for column in filled] for row in rows]


def _name_metric(name: str) -> str:
    measure, _, task = name.partition("/")
    return f"{_MEASURES.get(measure, measure)} {task.replace('_to_', ' → ')}".strip()


def render_facts(version: ModelVersionSummary) -> str:
    """Return what the list of versions knows of one as Markdown, for one that has no card."""
    facts = {
        "load as": f"`{version.uri}`",
        "aliases": ", ".join(version.aliases) or "none",
        "fingerprint": f"`{version.fingerprint}`",
    }
    lines = [f"### {version.name}, version {version.version}", "It was registered without a card.\n"]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(lines)
