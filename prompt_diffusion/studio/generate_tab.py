"""The tab Generate: an example pair, a query and a text become an image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from prompt_diffusion.studio.actions import Actions
from prompt_diffusion.studio.examples import render_samples
from prompt_diffusion.studio.history_view import HistoryView, fill_result
from prompt_diffusion.studio.layout import ResultView, SettingsFields, build_result, build_settings
from prompt_diffusion.studio.limits import build_upload
from prompt_diffusion.studio.maps import list_tasks
from prompt_diffusion.studio.running import ONE_AT_A_TIME, connect_run, tell_steps
from prompt_diffusion.studio.toasts import toast_errors
from prompt_diffusion.vision_tasks import find_vision_task

_FIRST_TASK = "image_to_hed"


@dataclass(frozen=True, slots=True)
class PairMaker:
    """The fields that make a pair of a photograph."""

    photograph: gr.Image
    task: gr.Dropdown
    annotator: gr.Dropdown
    make_pair: gr.Button
    make_query: gr.Button


@dataclass(frozen=True, slots=True)
class GenerateTab:
    """The fields of the tab."""

    source: gr.Image
    target: gr.Image
    query: gr.Image
    settings: SettingsFields
    maker: PairMaker
    run: gr.Button
    stop: gr.Button
    result: ResultView

    def inputs(self) -> list[Any]:
        """Return the images."""
        return [self.source, self.target, self.query]


def build_generate_tab(actions: Actions, samples: Path) -> GenerateTab:
    """Draw the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6):
            with gr.Row():
                source = build_upload("Example source", "source")
                target = build_upload("Example target", "target")
                query = build_upload("Query", "query")
            with gr.Accordion("No pair at hand? Make one of a photograph", open=False):
                maker = _build_pair_maker(actions)
            settings = build_settings("Text", "Empty lets the example pair decide alone")
            with gr.Row():
                run = gr.Button("Generate", variant="primary", scale=3)
                stop = gr.Button("Stop", variant="stop", scale=1)
        with gr.Column(scale=4, min_width=320):
            result = build_result("Result", 420)
    rows = [
        [s.source, s.target, s.query, s.prompt, s.num_inference_steps, s.guidance_scale]
        for s in render_samples(samples)
    ]
    gr.Examples(
        rows,
        [source, target, query, settings.prompt, settings.num_inference_steps, settings.guidance_scale],
        label="Samples: click a row, then Generate (scenes of the demo's world, with settings that suit its model)",
        cache_examples=False,
        api_visibility="private",
    )
    return GenerateTab(source, target, query, settings, maker, run, stop, result)


def _build_pair_maker(actions: Actions) -> PairMaker:
    choices, default = actions.maps.list_annotators(find_vision_task(_FIRST_TASK).condition)
    gr.Markdown(
        "An annotator makes the photograph's map; photograph and map become the pair, in the direction of the vision task.",
        elem_classes="note",
    )
    with gr.Row():
        photograph = build_upload("Photograph", "photograph", 180)
        with gr.Column():
            task = gr.Dropdown(list_tasks(), value=_FIRST_TASK, label="Vision task")
            annotator = gr.Dropdown(choices, value=default, label="Annotator")
    with gr.Row():
        make_pair = gr.Button("Make the pair")
        make_query = gr.Button("Turn the query into its map")
    return PairMaker(photograph, task, annotator, make_pair, make_query)


def connect_generate_tab(tab: GenerateTab, actions: Actions, model: gr.Dropdown, history: HistoryView) -> None:
    """Let the buttons do what they say."""
    maker = tab.maker

    @toast_errors
    def list_annotators(task: str) -> gr.Dropdown:
        choices, default = actions.maps.list_annotators(find_vision_task(task).condition)
        return gr.Dropdown(choices=choices, value=default)

    @toast_errors
    def generate(
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio hands it over
        *values: Any,  # noqa: ANN401 - the fields' values, in the order of the inputs below
    ) -> list[Any]:
        reference, source, target, query, made, *rest = values
        fields = {"model": reference, **dict(zip(SettingsFields.names(), rest, strict=True))}
        images = {"query": query, "example_1_source": source, "example_1_target": target}
        result, _, made = actions.make(fields, images, made, str(request.session_hash), tell_steps(progress))
        return [*fill_result(result), made, made.gallery]

    connect_run(
        generate,
        [tab.run.click, tab.settings.prompt.submit],
        tab.stop,
        [model, *tab.inputs(), history.state, *tab.settings.components()],
        [*tab.result.components(), *history.components()],
        tab.result,
        actions,
    )
    maker.task.change(list_annotators, maker.task, maker.annotator, show_progress="hidden", api_visibility="private")
    maker.make_pair.click(
        toast_errors(actions.make_pair),
        [maker.photograph, maker.task, maker.annotator],
        [tab.source, tab.target, tab.settings.prompt],
        concurrency_id=ONE_AT_A_TIME,
        api_visibility="private",
    )
    maker.make_query.click(
        toast_errors(actions.make_map),
        [tab.query, maker.annotator],
        tab.query,
        concurrency_id=ONE_AT_A_TIME,
        api_visibility="private",
    )
