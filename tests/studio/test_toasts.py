"""What the page says of an error."""

import pytest

gradio = pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")

from prompt_diffusion.studio.toasts import toast_errors  # noqa: E402


def test_a_message_cannot_bring_markup_into_the_page():
    @toast_errors
    def fail():
        raise ValueError("<img src=x onerror=alert(1)> is no image")

    with pytest.raises(gradio.Error) as caught:
        fail()
    assert caught.value.message == "&lt;img src=x onerror=alert(1)&gt; is no image"
