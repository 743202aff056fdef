"""Starts the page on this machine: no analytics, no share link, nothing fetched from elsewhere."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.generation import identify_model
from prompt_diffusion.settings import Settings

if TYPE_CHECKING:
    from gradio import Blocks
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
# the page may load and ask nothing but itself, whatever a part of it would like to
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)


class ContentPolicy:
    """Adds the policy to every answer."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""

        async def send_with_policy(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def serve(settings: Settings, model: str, host: str, port: int, device: str, on_ready: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted; `on_ready` is told its address.

    ValueError where the port cannot be used, or the registry has no such model. A SIGTERM ends it as an interrupt does.
    """
    _check_port(host, port)
    identify_model(model, settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that visitors' files are deleted
    with tempfile.TemporaryDirectory(prefix="prompt-diffusion-studio-") as folder:
        # read when gradio is imported
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "files")
        os.environ.setdefault("DO_NOT_TRACK", "1")
        page = _launch(settings, model, host, port, device, Path(folder))
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        page.block_thread()


def _launch(settings: Settings, model: str, host: str, port: int, device: str, folder: Path) -> "Blocks":
    from starlette.middleware import Middleware

    from prompt_diffusion.studio.actions import Actions
    from prompt_diffusion.studio.app import build_page
    from prompt_diffusion.studio.layout import CSS, THEME
    from prompt_diffusion.studio.limits import MAX_UPLOAD_BYTES
    from prompt_diffusion.studio.maps import StudioAnnotators
    from prompt_diffusion.studio.models import ModelShelf

    is_local = host in LOCAL_HOSTS
    samples = folder / "samples"
    samples.mkdir()
    shelf = ModelShelf(settings, model, device, takes_folders=is_local)
    page = build_page(Actions(shelf, StudioAnnotators(settings, device)), samples, model, takes_folders=is_local)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        max_file_size=MAX_UPLOAD_BYTES,
        allowed_paths=[],
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=THEME,
        css=CSS,
        app_kwargs={"middleware": [Middleware(ContentPolicy)]},
        prevent_thread_lock=True,
    )
    return page


def _check_port(host: str, port: int) -> None:
    """Raise ValueError where nobody can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of {host} cannot be used ({error.strerror}): another program may listen there; choose another "
                "with --port"
            ) from None
