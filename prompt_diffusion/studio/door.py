"""A guard in front of the page: every request is checked before gradio sees it, whatever gradio itself would allow.

Another web page that the visitor has open must get nothing here: neither under its own name that points to this machine (DNS
rebinding; the Host must be ours), nor by cross-origin requests (the Origin must be ours). A request may name only
uploaded files. Bodies and the folder of uploads are bounded. Routes that the page does not use are closed.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.studio.callers import check_host, check_origin, check_password
from prompt_diffusion.studio.limits import MAX_BODY_BYTES
from prompt_diffusion.studio.refusal import RefusedError, answer
from prompt_diffusion.studio.routes import API, UPLOAD, WRITE, check_read
from prompt_diffusion.studio.uploads import check_files, check_upload

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

# The page may load and request nothing from elsewhere, whatever its components try.
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        b"style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What this page accepts."""

    names: frozenset[str]
    """Names under which it may be asked for, lower case."""
    takes_addresses: bool
    """Whether any IP address is accepted as its name: no other page can have one of ours."""
    folder: Path
    """The folder of uploads and results."""
    password: str | None = None
    """What every request must send, by HTTP basic authentication; None: no password."""


class Door:
    """The ASGI application before gradio's."""

    def __init__(self, app: "ASGIApp", rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            if scope["type"] != "http":
                raise RefusedError(404, "the page uses no such connection")
            body = await self._examine(scope, receive)
        except RefusedError as refused:
            logger.warning("refused %s %.200r: %s", scope.get("method", ""), scope["path"], refused.reason)
            await answer(send_guarded, refused)
            return
        await self._app(scope, receive if body is None else _replay(body, receive), send_guarded)

    async def _examine(self, scope: "Scope", receive: "Receive") -> bytes | None:
        """Raise if the request is refused; return the body if it had to be read."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = _read_path(scope), scope["method"]
        check_host(headers.get("host", ""), self._rules.names, self._rules.takes_addresses)
        check_origin(headers, path, method)
        if self._rules.password is not None and path != f"{API}/startup-events":  # which gradio asks itself
            check_password(headers.get("authorization", ""), self._rules.password)
        if method in ("GET", "HEAD"):
            check_read(path)
            return None
        if method != "POST" or not path.startswith(API):
            raise RefusedError(404, "the page has nothing there")
        rest = path.removeprefix(API)
        num_bytes = _read_length(headers)
        if rest == UPLOAD:
            check_upload(num_bytes, self._rules.folder)
            return None
        if rest not in WRITE:
            raise RefusedError(404, "the page has nothing there")
        if num_bytes > MAX_BODY_BYTES:
            raise RefusedError(413, f"a request has up to {MAX_BODY_BYTES >> 10} kB, this one {num_bytes >> 10}")
        body = await _read_body(receive, num_bytes)
        check_files(body, self._rules.folder)
        return body


def _read_path(scope: "Scope") -> str:
    """Return the path in its normal spelling."""
    path = str(scope["path"])
    return path.rstrip("/") or "/"


def _read_length(headers: dict[str, str]) -> int:
    """Return how long a body is; ASGI servers hold a client to the announced length."""
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not length.isdecimal() or len(length) > 15:
        raise RefusedError(411, "a request must say how long it is")
    return int(length)


async def _read_body(receive: "Receive", num_bytes: int) -> bytes:
    pieces, total, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the request broke off")
        pieces.append(message.get("body", b""))
        total += len(pieces[-1])
        more = message.get("more_body", False)
        if total > num_bytes:
            raise RefusedError(413, "the request is longer than it said")
    return b"".join(pieces)


def _replay(body: bytes, receive: "Receive") -> "Receive":
    """Return a receive function that replays a body already read, and then passes on later messages."""
    is_sent = False

    async def receive_again() -> "Message":
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
