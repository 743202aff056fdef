"""Starts the page on this machine: no analytics, no share link, nothing fetched from elsewhere."""

import os
import secrets
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

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MIN_PASSWORD = 12
"""Minimum length of a chosen password: it can be guessed as fast as requests are answered."""


def choose_password(settings: Settings, host: str) -> tuple[str | None, bool]:
    """Return the password of a page that listens there, and whether it was just generated.

    None if only this machine can reach the page and no password is set; ValueError for one that is too short.
    """
    if settings.studio_password is not None:
        password = settings.studio_password.get_secret_value()
        if len(password) < MIN_PASSWORD:
            raise ValueError(
                f"PROMPT_DIFFUSION_STUDIO_PASSWORD has {len(password)} characters: take at least {MIN_PASSWORD}"
            )
        return password, False
    return (None, False) if host in LOCAL_HOSTS else (secrets.token_urlsafe(18), True)


def serve(
    settings: Settings,
    model: str,
    host: str,
    port: int,
    device: str,
    password: str | None,
    on_ready: Callable[[str], None],
) -> None:
    """Serve the page until it is interrupted; ``on_ready`` gets its address.

    ValueError if the port cannot be used, or the registry has no such model. A SIGTERM ends it like an interrupt.
    """
    if password is None and host not in LOCAL_HOSTS:
        raise ValueError(f"a page that listens on {host} needs a password")
    _check_port(host, port)
    identify_model(model, settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that visitors' files are deleted
    with tempfile.TemporaryDirectory(prefix="prompt-diffusion-studio-") as folder:
        # read when gradio is imported
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "files")
        os.environ.setdefault("DO_NOT_TRACK", "1")
        page = _launch(settings, model, host, port, device, password, Path(folder))
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        page.block_thread()


def _launch(
    settings: Settings, model: str, host: str, port: int, device: str, password: str | None, folder: Path
) -> "Blocks":
    from starlette.middleware import Middleware

    from prompt_diffusion.studio.actions import Actions
    from prompt_diffusion.studio.app import build_page
    from prompt_diffusion.studio.door import Door, Rules
    from prompt_diffusion.studio.layout import CSS, THEME
    from prompt_diffusion.studio.limits import MAX_UPLOAD_BYTES
    from prompt_diffusion.studio.maps import StudioAnnotators
    from prompt_diffusion.studio.models import ModelShelf

    is_local = host in LOCAL_HOSTS
    names = frozenset(name.lower() for name in (*LOCAL_HOSTS, *(() if is_local else (host, socket.gethostname()))))
    rules = Rules(names, takes_addresses=not is_local, folder=folder / "files", password=password)
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
        app_kwargs={"middleware": [Middleware(Door, rules=rules)]},
        prevent_thread_lock=True,
    )
    return page


def _check_port(host: str, port: int) -> None:
    """Raise ValueError if the address cannot be listened on."""
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
