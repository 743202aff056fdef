"""The history below the tabs: a gallery, two results side by side, and the way back to a result's settings."""

from dataclasses import dataclass
from typing import Any, Protocol

import gradio as gr

from prompt_diffusion.studio.history import History, Result, describe
from prompt_diffusion.studio.layout import ResultView, SettingsFields, build_result
from prompt_diffusion.studio.toasts import toast_errors

_NAMES = SettingsFields.names()
_TEXTS = ("prompt", "negative_prompt", "scheduler")  # whose empty field is "", not None


class TabFields(Protocol):
    """A tab whose fields can be filled again."""

    @property
    def settings(self) -> SettingsFields:
        """The settings."""

    def inputs(self) -> list[Any]:
        """Return the images, and how they are used."""


@dataclass(frozen=True, slots=True)
class HistoryView:
    """The parts of the history."""

    state: gr.State
    gallery: gr.Gallery
    comparison: gr.Row
    left: ResultView
    right: ResultView
    reuse: gr.Button

    def components(self) -> list[Any]:
        """Return what changes when a result is added."""
        return [self.state, self.gallery]


def build_history_view() -> HistoryView:
    """Draw the history, empty."""
    state = gr.State(History())
    gr.Markdown(
        "### History\nResults of this visit, newest first. Click a result to see it again; click another to compare the two."
    )
    gallery = gr.Gallery(
        label="Results of this visit, newest first",
        show_label=False,
        columns=8,
        height=170,
        fit_columns=False,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="history",
    )
    with gr.Row(visible=False, elem_id="comparison") as comparison:
        with gr.Column():
            left = build_result("Before that", 320)
        with gr.Column():
            right = build_result("Chosen", 320)
            reuse = gr.Button("Use these settings and images again")
    return HistoryView(state, gallery, comparison, left, right, reuse)


def fill_result(result: Result | None) -> list[Any]:
    """Return what a result view shows."""
    file = None if result is None else result.file
    return [file, describe(result), gr.DownloadButton(value=file, interactive=file is not None)]


def connect_history_view(
    view: HistoryView, tabs: gr.Tabs, model: gr.Dropdown, generate: TabFields, edit: TabFields
) -> None:
    """Let a click bring a result to the right, and the button bring its settings and images back to its tab."""

    @toast_errors
    def choose(history: History, event: gr.SelectData) -> list[Any]:
        chosen = history.show(event.index)
        return [chosen, gr.Row(visible=True), *fill_result(chosen.left), *fill_result(chosen.right)]

    view.gallery.select(
        choose,
        [view.state],
        [view.state, view.comparison, *view.left.components(), *view.right.components()],
        show_progress="hidden",
        api_visibility="private",
    )
    generate_fields = [*generate.inputs(), *generate.settings.components()]
    edit_fields = [*edit.inputs(), *edit.settings.components()]

    @toast_errors
    def reuse(history: History) -> list[Any]:
        if history.right is None:
            raise ValueError("choose a result of the history first")
        result = history.right
        request = result.record.request
        settings = [getattr(request, name) or "" if name in _TEXTS else getattr(request, name) for name in _NAMES]
        images = [result.inputs.get(name) for name in ("query", "example_1_source", "example_1_target")]
        filled = [result.model, gr.Tabs(selected=result.tab)]
        if result.tab == "edit":
            query, first, second = images
            unchanged = [gr.skip()] * len(generate_fields)
            return [*filled, *unchanged, query, first, second, result.way, request.condition or gr.skip(), *settings]
        query, source, target = images
        return [*filled, source, target, query, *settings, *[gr.skip()] * len(edit_fields)]

    view.reuse.click(
        reuse,
        [view.state],
        [model, tabs, *generate_fields, *edit_fields],
        show_progress="hidden",
        api_visibility="private",
    )
