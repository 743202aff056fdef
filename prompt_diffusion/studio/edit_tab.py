"""The tab Edit: a new text for an image, or an edit that a before and an after show."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from prompt_diffusion.studio.actions import Actions
from prompt_diffusion.studio.examples import render_edit_samples
from prompt_diffusion.studio.history_view import HistoryView, fill_result
from prompt_diffusion.studio.layout import (
    ResultView,
    SettingsFields,
    build_picture,
    build_result,
    build_settings,
)
from prompt_diffusion.studio.limits import build_upload
from prompt_diffusion.studio.running import connect_run, tell_steps
from prompt_diffusion.studio.toasts import toast_errors
from prompt_diffusion.vision_tasks import VISION_TASKS

BY_TEXT, BY_EXAMPLE = "by text", "by example"
_WAYS = [("Say what the new image shows", BY_TEXT), ("Show a before and an after", BY_EXAMPLE)]
_LABELS = {BY_TEXT: ("Photograph", "Its map"), BY_EXAMPLE: ("Before", "After")}


@dataclass(frozen=True, slots=True)
class EditTab:
    """The fields of the tab."""

    image: gr.Image
    way: gr.Radio
    condition: gr.Dropdown
    first: gr.Image
    second: gr.Image
    settings: SettingsFields
    run: gr.Button
    stop: gr.Button
    condition_map: gr.Image
    result: ResultView

    def inputs(self) -> list[Any]:
        """Return the images, and how they are used."""
        return [self.image, self.first, self.second, self.way, self.condition]


def build_edit_tab(samples: Path) -> EditTab:
    """Draw the tab."""
    conditions = list(dict.fromkeys(task.condition for task in VISION_TASKS.values()))
    with gr.Row(equal_height=False):
        with gr.Column(scale=6):
            with gr.Row():
                image = build_upload("Image to edit", "edit-image")
                first = build_upload("Photograph", "edit-first")
                second = build_upload("Its map", "edit-second")
            with gr.Row():
                way = gr.Radio(_WAYS, value=BY_TEXT, label="How")
                condition = gr.Dropdown(
                    conditions, value=conditions[0], label="Kept of the image", info="The map in between."
                )
            gr.Markdown(
                "By text: image → map → new image. A photograph with its map is optional, and shows the model which map is "
                "meant.",
                elem_classes="note",
            )
            settings = build_settings("New text", "What the new image shows")
            with gr.Row():
                run = gr.Button("Edit", variant="primary", scale=3, elem_id="run-edit")
                stop = gr.Button("Stop", variant="stop", scale=1)
        with gr.Column(scale=4, min_width=320):
            condition_map = build_picture("Map in between", 240, "map-between")
            result = build_result("Edited", 380)
    rows = [
        [s.image, s.first, s.second, s.prompt, s.num_inference_steps, s.guidance_scale]
        for s in render_edit_samples(samples)
    ]
    gr.Examples(
        rows,
        [image, first, second, settings.prompt, settings.num_inference_steps, settings.guidance_scale],
        label="Sample: click it, then Edit",
        cache_examples=False,
        api_visibility="private",
    )
    return EditTab(image, way, condition, first, second, settings, run, stop, condition_map, result)


def connect_edit_tab(tab: EditTab, actions: Actions, model: gr.Dropdown, history: HistoryView) -> None:
    """Let the buttons do what they say."""

    @toast_errors
    def relabel(way: str) -> list[Any]:
        first, second = _LABELS[way]
        return [gr.Image(label=first), gr.Image(label=second), gr.Dropdown(visible=way == BY_TEXT)]

    @toast_errors
    def edit(
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio hands it over
        *values: Any,  # noqa: ANN401 - the fields' values, in the order of the inputs below
    ) -> list[Any]:
        reference, image, first, second, way, condition, made, *rest = values
        fields = {"model": reference, **dict(zip(SettingsFields.names(), rest, strict=True))}
        if way == BY_TEXT:
            fields |= {"mode": "edit", "condition": condition}
        elif first is None or second is None:
            raise ValueError("an edit by example needs both a before and an after")
        images = {"query": image, "example_1_source": first, "example_1_target": second}
        result, map_file, made = actions.make(
            fields, images, made, str(request.session_hash), tell_steps(progress), way
        )
        return [gr.Image(value=map_file, visible=map_file is not None), *fill_result(result), made, made.gallery]

    tab.way.change(
        relabel, tab.way, [tab.first, tab.second, tab.condition], show_progress="hidden", api_visibility="private"
    )
    connect_run(
        edit,
        [tab.run.click, tab.settings.prompt.submit],
        tab.stop,
        [model, *tab.inputs(), history.state, *tab.settings.components()],
        [tab.condition_map, *tab.result.components(), *history.components()],
        tab.result,
        actions,
    )
