"""What one visitor has made since the page was opened: to compare, to download again, to go on from."""

from dataclasses import dataclass, replace
from html import escape

from prompt_diffusion.generation import GenerationRecord
from prompt_diffusion.studio.limits import MAX_HISTORY


@dataclass(frozen=True, slots=True)
class Result:
    """One image that was made, and what it was made of."""

    file: str
    """The PNG with its settings."""
    record: GenerationRecord
    model: str
    """The reference that was chosen, which the record keeps as a version."""
    inputs: dict[str, str]
    """The uploaded files by what they are: ``query``, ``example_1_source``, ``example_1_target``."""

    way: str | None = None
    """How it was edited, where the tab Edit made it."""

    @property
    def tab(self) -> str:
        """The tab that made it."""
        return "generate" if self.way is None else "edit"

    @property
    def caption(self) -> str:
        """What stands below it in the gallery."""
        request = self.record.request
        return f"seed {request.seed}" + (f" · {request.prompt}" if request.prompt else "")


@dataclass(frozen=True, slots=True)
class History:
    """Results, newest first, and the two that stand side by side."""

    results: tuple[Result, ...] = ()
    left: Result | None = None
    right: Result | None = None

    def add(self, result: Result) -> "History":
        """Return the history with one more result; the oldest goes where there are too many."""
        return replace(self, results=(result, *self.results)[:MAX_HISTORY])

    def show(self, index: int) -> "History":
        """Return the history with that result on the right, and what was there on the left; ValueError where there is none."""
        if not isinstance(index, int) or not 0 <= index < len(self.results):
            raise ValueError("there is no such result any more")
        chosen = self.results[index]
        if self.right == chosen:
            return self
        return replace(self, left=self.right, right=chosen)

    @property
    def gallery(self) -> list[tuple[str, str]]:
        """Return (file, caption) of each result."""
        return [(result.file, result.caption) for result in self.results]


def describe(result: Result | None) -> str:
    """Return the settings of a result as Markdown: the seed first, since a random one is known only now."""
    if result is None:
        return ""
    request = result.record.request
    lines = [
        f"**Seed {request.seed}** · {request.num_inference_steps} steps · guidance {request.guidance_scale:g} · "
        f"{request.size} x {request.size} pixels"
    ]
    if request.prompt:
        lines.append(f"“{escape(request.prompt)}”")
    if request.negative_prompt:
        lines.append(f"not “{escape(request.negative_prompt)}”")
    details = [escape(request.model)]
    if request.mode == "edit":
        details.append(f"edit by text, through {escape(request.condition or '')}")
    elif result.way is not None:
        details.append("edit by example")
    if request.controlnet_conditioning_scale != 1.0:
        details.append(f"strength {request.controlnet_conditioning_scale:g}")
    if request.scheduler:
        details.append(request.scheduler)
    return "  \n".join([*lines, " · ".join(details)])
