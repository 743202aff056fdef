"""What the buttons do: from the page's fields to files, each through the same functions as the command line."""

import secrets
import threading
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.generation import (
    Generation,
    GenerationRequest,
    OnStep,
    build_request,
    encode_result,
    run_request,
)
from prompt_diffusion.studio.history import History, Result
from prompt_diffusion.studio.limits import MAX_SIZE, MAX_STEPS, read_upload
from prompt_diffusion.studio.maps import StudioAnnotators
from prompt_diffusion.studio.models import ModelShelf
from prompt_diffusion.studio.toasts import StoppedError
from prompt_diffusion.vision_tasks import find_vision_task

RANDOM_SEED = -1
OWN_IF_ZERO = ("num_inference_steps", "guidance_scale", "size")
"""Fields whose 0 stands for the model's own value: number fields cannot be empty."""


class Actions:
    """The page's actions; what belongs to one visitor comes in and goes out with each call."""

    def __init__(self, shelf: ModelShelf, maps: StudioAnnotators) -> None:
        self.shelf, self.maps = shelf, maps
        self._stops: dict[str, threading.Event] = {}

    def make(
        self,
        fields: dict[str, Any],
        inputs: dict[str, str | None],
        history: History,
        visitor: str,
        on_step: OnStep,
        way: str | None = None,
    ) -> tuple[Result, str | None, History]:
        """Run one request and return its result, the file of the map in between (of an edit), and the longer history.

        ValueError, in one sentence, for what is missing, refused or too large.
        """
        request = build_request(_settle(fields))
        _check_size(request)
        present = _check_inputs(inputs)
        files = {name: _read(name, path) for name, path in present.items()}
        pair = [(files["example_1_source"], files["example_1_target"])] if len(files) > 1 else []
        stop = self._stops[visitor] = threading.Event()

        def step(done: int, total: int) -> None:
            if stop.is_set():
                raise StoppedError
            on_step(done, total)

        try:
            with self.shelf.borrow(request.model) as model:
                step(0, 1)  # loading may have taken a while
                generation = run_request(request, model, files["query"], pair, step)
        finally:
            self._stops.pop(visitor, None)
        for note in generation.notes:
            gr.Warning(escape(note), duration=15)
        result = Result(_save_result(generation), generation.record, request.model, present, way)
        condition_map = generation.condition_map
        map_file = None if condition_map is None else save_png(encode_png(condition_map), "map")
        return result, map_file, history.add(result)

    def stop(self, visitor: str) -> None:
        """Let a visitor's run end at its next step."""
        event = self._stops.get(visitor)
        if event is not None:
            event.set()

    def make_pair(self, photograph: str | None, task_name: str, annotator: str) -> tuple[str, str, str]:
        """Return the files of source and target, and the text that goes with the vision task."""
        task = find_vision_task(task_name)
        if photograph is None:
            raise ValueError("drop a photograph first: the pair is made of it and its map")
        map_file = self.make_map(photograph, annotator)
        pair = (photograph, map_file) if task.direction == "image_to_map" else (map_file, photograph)
        return *pair, task.text or ""

    def make_map(self, photograph: str | None, annotator: str) -> str:
        """Return the file of a photograph's map."""
        if photograph is None:
            raise ValueError("there is no photograph to make a map of: drop one first")
        data = _read("photograph", photograph)
        png = self.maps.make_map(data, annotator)
        note = self.maps.say_limit(data, annotator)
        if note is not None:
            gr.Warning(escape(note), duration=15)
        return save_png(png, f"{Path(photograph).stem}-{annotator}")


def save_png(data: bytes, stem: str) -> str:
    """Keep a file where the page serves files from, under a folder named by its digest; return its path."""
    return str(save_bytes_to_cache(data, f"{stem}.png", get_upload_folder()))


def _save_result(generation: Generation) -> str:
    png = encode_result(generation.image, generation.record)
    return save_png(png, f"prompt-diffusion-seed-{generation.record.request.seed}")


def _settle(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without those that leave it to the model, and with a random seed drawn."""
    kept = {name: value for name, value in fields.items() if value is not None and value != ""}
    for name in OWN_IF_ZERO:
        if kept.get(name) == 0:
            del kept[name]
    if kept.get("seed", RANDOM_SEED) == RANDOM_SEED:
        kept["seed"] = secrets.randbelow(2**31)
    return kept


def _check_size(request: GenerationRequest) -> None:
    """Refuse what would hold the page for everybody else."""
    if (request.num_inference_steps or 1) > MAX_STEPS:
        raise ValueError(f"the page takes up to {MAX_STEPS} steps, got {request.num_inference_steps}")
    if (request.size or 1) > MAX_SIZE:
        raise ValueError(f"the page takes up to {MAX_SIZE} pixels a side, got {request.size}")


def _check_inputs(inputs: dict[str, str | None]) -> dict[str, str]:
    """Return the files that are there; ValueError where the query, or one side of the pair, is not."""
    present = {name: path for name, path in inputs.items() if path is not None}
    if "query" not in present:
        raise ValueError("there is no query: drop the image that the model shall work on")
    if len(present) == 2:
        missing = "target" if "example_1_source" in present else "source"
        raise ValueError(f"the example pair lacks its {missing}: give both images, or neither")
    return present


def _read(name: str, path: str) -> bytes:
    try:
        return read_upload(path)
    except ValueError as error:
        raise ValueError(f"{name.replace('_1_', ' ')}: {error}") from None
