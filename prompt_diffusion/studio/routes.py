"""The routes that the page uses; all others are closed."""

from urllib.parse import unquote

from prompt_diffusion.studio.refusal import RefusedError

API = "/gradio_api"
_PAGE = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
_PARTS = ("/assets/", "/static/", "/svelte/")
_READ = (
    "/info",
    "/startup-events",
    "/app_id",
    "/queue/data",
    "/queue/status",
    "/upload_progress",
    "/theme.css",
    "/user",
)
WRITE = ("/queue/join", "/run/predict", "/cancel", "/reset")
UPLOAD = "/upload"


def check_read(path: str) -> None:
    """Refuse to read what the page does not."""
    if path in _PAGE or path.startswith(_PARTS):
        return
    rest = path.removeprefix(API) if path.startswith(f"{API}/") else ""
    if rest in _READ or rest.startswith("/heartbeat/"):
        return
    # gradio would fetch an address given here instead of a file
    if rest.startswith("/file=") and "://" not in unquote(rest) and not unquote(rest).startswith("/file=//"):
        return
    raise RefusedError(404, "the page has nothing there")
