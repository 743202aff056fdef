"""The page: tabs Generate, Edit and Models, and the visitor's history below them."""

from pathlib import Path

import gradio as gr

from prompt_diffusion.studio.actions import Actions
from prompt_diffusion.studio.edit_tab import build_edit_tab, connect_edit_tab
from prompt_diffusion.studio.generate_tab import build_generate_tab, connect_generate_tab
from prompt_diffusion.studio.history_view import build_history_view, connect_history_view
from prompt_diffusion.studio.layout import TITLE
from prompt_diffusion.studio.limits import MAX_WAITING
from prompt_diffusion.studio.models_tab import build_models_tab

KEEP_FILES_SECONDS = 24 * 3600


def build_page(actions: Actions, samples: Path, first_model: str, takes_folders: bool) -> gr.Blocks:
    """Return the page; sample images are written to the folder ``samples``."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, KEEP_FILES_SECONDS)) as page:
        with gr.Row(elem_id="head"):
            with gr.Column(scale=6):
                gr.Markdown(
                    f"# {TITLE}\nShow an example pair and a query: the model does to the query what the pair shows."
                )
            with gr.Column(scale=4, min_width=320):
                model = gr.Dropdown(
                    actions.shelf.list_choices(),
                    value=first_model,
                    label="Model",
                    info="A registered model" + (", or type the path of a folder." if takes_folders else "."),
                    allow_custom_value=takes_folders,
                    elem_id="model",
                )
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = build_generate_tab(actions, samples)
            with gr.Tab("Edit", id="edit"):
                edit = build_edit_tab(samples)
            with gr.Tab("Models", id="models"):
                build_models_tab(actions.shelf, page)
        history = build_history_view()
        connect_generate_tab(generate, actions, model, history)
        connect_edit_tab(edit, actions, model, history)
        connect_history_view(history, tabs, model, generate, edit)
        page.load(
            lambda: gr.Dropdown(choices=actions.shelf.list_choices()),
            outputs=model,
            show_progress="hidden",
            api_visibility="private",
        )
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page
