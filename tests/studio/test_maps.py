"""Condition maps of what a visitor brings."""

import pytest

pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")


def test_an_annotator_without_its_weights_is_refused_at_once(actions, scene_files):
    choices, default = actions.maps.list_annotators("depth")
    assert ("depth_midas (weights are not here)", "depth_midas") in choices
    with pytest.raises(ValueError, match="fetch them once with `prompt-diffusion weights mirror depth_midas`"):
        actions.make_map(str(scene_files["query"]), default)
