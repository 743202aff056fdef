"""Condition maps of uploaded photographs, for pairs and queries that a visitor has only photographs of."""

from functools import lru_cache

from prompt_diffusion.annotators.base import AnnotateResources, Annotator
from prompt_diffusion.annotators.bounds import say_limit
from prompt_diffusion.annotators.choose import can_run, choose_annotator, list_makers
from prompt_diffusion.annotators.shards import MIRROR
from prompt_diffusion.annotators.table import build_annotator, find_annotator
from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.image_files import open_image
from prompt_diffusion.settings import Settings
from prompt_diffusion.store.uris import join_uri
from prompt_diffusion.vision_tasks import OTHER_VISION_TASKS, VISION_TASKS


def list_tasks() -> list[tuple[str, str]]:
    """Return (label, name) of the vision tasks of the paper."""
    return [(name.replace("_to_", " → "), name) for name in (*VISION_TASKS, *OTHER_VISION_TASKS)]


class StudioAnnotators:
    """Makes maps with the annotators that can run on this machine."""

    def __init__(self, settings: Settings, device: str) -> None:
        self._resources = AnnotateResources(weights_mirror=join_uri(settings.store, MIRROR), device=device)
        self._build = lru_cache(maxsize=2)(self._build_annotator)

    def list_annotators(self, condition: str) -> tuple[list[tuple[str, str]], str]:
        """Return (label, name) of a condition's annotators, saying which lack their weights, and the name of the default."""
        choices = [
            (spec.name if can_run(spec, self._resources) else f"{spec.name} (weights are not here)", spec.name)
            for spec in list_makers(condition)
        ]
        return choices, choose_annotator(condition, self._resources).name

    def make_map(self, photograph: bytes, annotator: str) -> bytes:
        """Return the map of a photograph as PNG; ValueError, in one sentence, where weights are missing."""
        return encode_png(self._build(annotator).annotate(decode_image(photograph)[None])[0])

    def say_limit(self, photograph: bytes, annotator: str) -> str | None:
        """Return a sentence if a photograph is larger than the annotator's maximum, else None."""
        with open_image(photograph) as image:
            return say_limit(annotator, image.height, image.width, find_annotator(annotator).max_pixels)

    def _build_annotator(self, name: str) -> Annotator:
        spec = find_annotator(name)
        if spec.weights is not None and not can_run(spec, self._resources):
            # a download of hundreds of megabytes, or a hub that does not answer, would block the page for everybody
            raise ValueError(
                f"the weights {spec.weights.file} of {name} are not on this machine: fetch them once with "
                f"`prompt-diffusion weights mirror {name}`, or choose another annotator"
            )
        return build_annotator(name, self._resources)
