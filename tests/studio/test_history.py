"""A visitor's earlier results."""

import pytest

pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")

from prompt_diffusion.studio.history import History, Result
from prompt_diffusion.studio.limits import MAX_HISTORY


def test_the_history_forgets_the_oldest_and_shows_two_side_by_side(make, tiny_pipeline):
    result, _, _ = make({"model": tiny_pipeline, "num_inference_steps": 1})
    results = [Result(f"{n}.png", result.record, result.model, {}) for n in range(MAX_HISTORY + 2)]
    history = History()
    for each in results:
        history = history.add(each)
    assert [each.file for each in history.results] == [f"{n}.png" for n in range(MAX_HISTORY + 1, 1, -1)]
    chosen = history.show(0).show(3)
    assert (chosen.left, chosen.right) == (history.results[0], history.results[3])
    assert chosen.show(3) == chosen
