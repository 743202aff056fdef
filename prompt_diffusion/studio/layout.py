"""The parts of the page that more than one tab has, and how it looks."""

from dataclasses import dataclass

import gradio as gr
from gradio.components import Component

from prompt_diffusion.studio.actions import RANDOM_SEED
from prompt_diffusion.studio.limits import MAX_SIZE, MAX_STEPS

TITLE = "Prompt Diffusion studio"
# the fonts of the reader's own system: the page must look the same where there is no network
THEME = gr.themes.Default(
    primary_hue="teal",
    neutral_hue="slate",
    radius_size="sm",
    font=["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
)
CSS = """
.gradio-container { width: 100%; max-width: 1360px !important; margin: auto; }
#head { align-items: end; }
#head h1 { margin-bottom: 0; }
/* small results would be drawn at their own few pixels */
.picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: auto; }
.picture .image-frame, .picture .image-container { height: 100%; }
/* the label and the buttons stand above an image, not on it */
.picture .image-container { padding-top: 30px; box-sizing: border-box; }
.picture .image-container .icon-button-wrapper { background: none; }
.note { opacity: 0.8; font-size: 0.9em; }
"""


@dataclass(frozen=True, slots=True)
class SettingsFields:
    """The fields of the settings, in the order in which actions take them."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    seed: gr.Number
    num_inference_steps: gr.Number
    guidance_scale: gr.Number
    controlnet_conditioning_scale: gr.Slider
    scheduler: gr.Dropdown
    size: gr.Number

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the request's fields that they set."""
        return tuple(cls.__dataclass_fields__)

    def components(self) -> list[Component]:
        """Return the fields."""
        return [getattr(self, name) for name in self.names()]


@dataclass(frozen=True, slots=True)
class ResultView:
    """Where a result is shown."""

    image: gr.Image
    details: gr.Markdown
    download: gr.DownloadButton

    def components(self) -> list[Component]:
        """Return the parts."""
        return [self.image, self.details, self.download]


def build_settings(prompt_label: str, prompt_placeholder: str) -> SettingsFields:
    """Draw the text, and the settings below it."""
    prompt = gr.Textbox(label=prompt_label, placeholder=prompt_placeholder, max_length=2000, lines=1)
    with gr.Row():
        seed = gr.Number(
            RANDOM_SEED, label="Seed", info="-1 draws one", precision=0, minimum=RANDOM_SEED, min_width=110
        )
        steps = gr.Number(
            0, label="Steps", info="0: the model's own", precision=0, minimum=0, maximum=MAX_STEPS, min_width=110
        )
        guidance = gr.Number(
            0, label="Guidance", info="0: the model's own; 1: none", minimum=0, maximum=100, step=0.5, min_width=110
        )
    with gr.Accordion("More settings", open=False):
        negative = gr.Textbox(label="Negative text", info="What guidance steers away from.", max_length=2000, lines=1)
        strength = gr.Slider(0.0, 2.0, 1.0, step=0.05, label="Strength", info="Weight of pair and query; 1 as trained.")
        with gr.Row():
            scheduler = gr.Dropdown(
                [("the model's", ""), ("DDIM", "ddim"), ("DPM-Solver++", "dpm"), ("UniPC", "unipc")],
                value="",
                label="Scheduler",
                info="The sampling method.",
            )
            size = gr.Number(
                0, label="Size", info="Pixels per side; 0: the model's own.", precision=0, minimum=0, maximum=MAX_SIZE
            )
    return SettingsFields(prompt, negative, seed, steps, guidance, strength, scheduler, size)


def build_picture(label: str, height: int, elem_id: str | None = None) -> gr.Image:
    """Draw a place for an image that the page makes; it shows the file itself, settings and all."""
    return gr.Image(
        label=label,
        type="filepath",
        format="png",
        interactive=False,
        height=height,
        buttons=["fullscreen"],
        elem_classes="picture",
        elem_id=elem_id,
    )


def build_result(label: str, height: int) -> ResultView:
    """Draw a result with its settings and its download."""
    image = build_picture(label, height)
    details = gr.Markdown("")
    download = gr.DownloadButton("Download PNG (settings inside)", interactive=False, size="md")
    return ResultView(image, details, download)
