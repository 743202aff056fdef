"""Answers that need no model, all from the example pair and the query, and the judging of answers pixel by pixel.

- copy: the example's target, as it is;
- mean: the example's target, its mean colour everywhere;
- nearest: the query's own photograph or trained map, of the kind whose example is nearest to the example's target;
- fitted: the query in the affine colour map that fits the example pair best, by least squares.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from prompt_diffusion.evaluation.color_fit import apply_color_map, fit_color_map
from prompt_diffusion.evaluation.rmse import ImageArray, compute_image_errors
from prompt_diffusion.evaluation.unseen_cases import CaseQuery

TRIVIAL: Final = ("copy", "mean", "nearest", "fitted")


def answer_trivially(query: CaseQuery) -> dict[str, ImageArray]:
    """Return the answers that need no model, uint8 (h, w, 3), by the names in ``TRIVIAL``."""
    target = query.example_target
    examples = np.stack([example for example, _ in query.known.values()])
    errors = compute_image_errors(examples, np.broadcast_to(target, examples.shape))
    nearest = list(query.known)[int(errors.argmin())]
    mean = target.mean(axis=(0, 1)).round().astype(np.uint8)
    return {
        "copy": target,
        "mean": np.broadcast_to(mean, target.shape),
        "nearest": query.known[nearest][1],
        "fitted": apply_color_map(fit_color_map(query.example_source, target), query.query),
    }


def judge_pixels(queries: Sequence[CaseQuery], images: ImageArray) -> npt.NDArray[np.bool_]:
    """Return for each judged pixel of all queries (pixels,) whether, of the colours that classes have, the nearest to its own
    is the truth's; nothing where colours stand for no class.
    """
    verdicts = [np.zeros(0, bool)]
    for query, image in zip(queries, images, strict=True):
        if query.class_colors is not None:
            pixels, colors = image[query.judged].astype(np.float64), query.class_colors.astype(np.float64)
            nearest = np.square(pixels[:, None] - colors).sum(axis=2).argmin(axis=1)
            verdicts.append((query.class_colors[nearest] == query.truth[query.judged]).all(axis=1))
    return np.concatenate(verdicts)
