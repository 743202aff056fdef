"""What the page's buttons do: a run that is stopped, another model, bounds."""

import threading

import pytest

pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")

from prompt_diffusion.studio.toasts import StoppedError


def test_stop_ends_the_visitor_s_own_run_at_its_next_step(make, actions, tiny_pipeline):
    fields = {"model": tiny_pipeline, "num_inference_steps": 50, "seed": 1}
    steps, stopped = [], threading.Event()

    def step(done, total):
        steps.append(done)
        if done == 2:
            actions.stop("someone else")
        if done == 4:
            actions.stop("someone")
            stopped.set()

    with pytest.raises(StoppedError):
        make(fields, on_step=step)
    assert stopped.is_set()
    assert steps[-1] == 4
    result, _, history = make(fields | {"num_inference_steps": 1})
    assert history.results == (result,)


def test_a_page_that_others_can_reach_loads_no_folder_but_its_own(make, tiny_base):
    with pytest.raises(ValueError, match="takes registered models alone"):
        make({"model": tiny_base})


def test_a_run_is_bounded(make, tiny_pipeline):
    with pytest.raises(ValueError, match="up to 200 steps, got 201"):
        make({"model": tiny_pipeline, "num_inference_steps": 201})
    with pytest.raises(ValueError, match="up to 1024 pixels a side, got 2048"):
        make({"model": tiny_pipeline, "size": 2048})
