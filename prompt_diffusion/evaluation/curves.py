"""Loss curves for each vision task: the joint model beside the baseline that saw as many samples of the task."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from prompt_diffusion.evaluation.config import Method
from prompt_diffusion.evaluation.table import name_task
from prompt_diffusion.store.codec import open_parquet
from prompt_diffusion.store.manifest import Manifest

LOSSES_FILE: Final = "losses.parquet"
NUM_BINS: Final = 40
_COLOURS: Final[Mapping[Method, str]] = {"Prompt Diffusion": "#1f5fa8", "CN(FT)": "#c06a1b"}
_DASHES: Final[Mapping[Method, str]] = {"Prompt Diffusion": "-", "CN(FT)": "--"}

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def read_curve(model: Manifest, vision_task: str) -> Curve:
    """Return (samples of the vision task seen, mean loss) of a training run, in at most 40 bins of equal length.

    Single batches are far too noisy to read: each point is the mean over its bin, weighted by samples.
    """
    table = open_parquet(model.read_file(LOSSES_FILE)).read()
    is_task = np.array([name == vision_task for name in table["vision_task"].to_pylist()], dtype=bool)
    losses = table["loss"].to_numpy().astype(np.float64)[is_task]
    weights = table["num_samples"].to_numpy().astype(np.float64)[is_task]
    if not weights.sum():
        return np.zeros(0), np.zeros(0)
    seen = np.cumsum(weights)
    bins = np.minimum((seen - 1) * NUM_BINS // seen[-1], NUM_BINS - 1).astype(int)
    totals = np.bincount(bins, weights, NUM_BINS)
    filled = totals > 0
    means = np.bincount(bins, weights * losses, NUM_BINS)[filled] / totals[filled]
    ends = np.array([seen[bins == index].max() for index in np.flatnonzero(filled)])
    return ends, means


def count_samples(curves: Mapping[tuple[Method, str], Curve]) -> dict[Method, list[int]]:
    """Return how many samples of each vision task a method saw in training."""
    counts: dict[Method, list[int]] = {}
    for (method, _), (seen, _) in curves.items():
        counts.setdefault(method, []).append(int(seen[-1]) if seen.size else 0)
    return counts


def draw_curves(curves: Mapping[tuple[Method, str], Curve], vision_tasks: Sequence[str]) -> str:
    """Return an SVG element with one panel per vision task, both methods in each; the same curves give the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(3, len(vision_tasks))
    rows = -(-len(vision_tasks) // columns)
    style: Any = {
        "svg.hashsalt": "prompt-diffusion",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.4 * columns, 2.15 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey="row").flatten()
        for panel in panels[len(vision_tasks) :]:
            panel.set_visible(False)
        for index, (panel, vision_task) in enumerate(zip(panels, vision_tasks, strict=False)):
            _draw_panel(panel, vision_task, curves, is_first=index == 0)
        figure.supxlabel("samples of the vision task seen in training", fontsize=9, color="#444")
        figure.supylabel("training loss", fontsize=9, color="#444")
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = sink.getvalue()
    return text[text.index("<svg") :]


def _draw_panel(
    panel: Any,  # noqa: ANN401 - a matplotlib Axes, whose methods are typed loosely
    vision_task: str,
    curves: Mapping[tuple[Method, str], Curve],
    *,
    is_first: bool,
) -> None:
    for method, colour in _COLOURS.items():
        seen, losses = curves.get((method, vision_task), (np.zeros(0), np.zeros(0)))
        if seen.size:
            panel.plot(seen, losses, _DASHES[method], color=colour, linewidth=1.5, label=method)
    panel.set_title(name_task(vision_task), fontsize=10, loc="left", color="#222")
    panel.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(colors="#555", length=2.5, labelsize=8, labelleft=True)
    for spine in panel.spines.values():
        spine.set_color("#999")
    panel.margins(x=0.02)
    if is_first and panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8, loc="upper right")
