"""What stands before the page: every request is looked at before gradio sees it, whatever gradio itself would allow.

Another web page that the visitor has open must get nothing here: neither under a name of its own that points to this machine
(DNS rebinding; the Host must be ours), nor by sending requests across (the Origin must be ours). A request names no file but
an uploaded one. Bodies and the folder of uploads are bounded. Routes that the page does not use are closed.
"""

import base64
import binascii
import ipaddress
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from prompt_diffusion.studio.limits import MAX_BODY_BYTES, MAX_FILES, MAX_FOLDER_BYTES, MAX_UPLOAD_BYTES, is_upload

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_API = "/gradio_api"
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
_WRITE = ("/queue/join", "/run/predict", "/cancel", "/reset")
_UPLOAD = "/upload"
_MAX_DEPTH = 40
_MULTIPART_BYTES = 64 << 10  # names and borders around an uploaded file
# The page may load and ask nothing but itself, whatever a part of it would like to.
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


class _RefusedError(Exception):
    """A request that goes no further, with its HTTP status and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, slots=True)
class Rules:
    """What this page takes."""

    names: frozenset[str]
    """Names under which it may be asked for, lower case."""
    takes_addresses: bool
    """Whether any IP address will do as its name: no other page can have one of ours."""
    folder: Path
    """Where uploads and results lie."""
    password: str | None = None
    """What every request must bring, by HTTP's basic authentication; None asks for none."""


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
                raise _RefusedError(404, "the page uses no such connection")
            body = await self._examine(scope, receive)
        except _RefusedError as refused:
            logger.warning("refused %s %.200r: %s", scope.get("method", ""), scope["path"], refused.reason)
            await _answer(send_guarded, refused)
            return
        await self._app(scope, receive if body is None else _replay(body, receive), send_guarded)

    async def _examine(self, scope: "Scope", receive: "Receive") -> bytes | None:
        """Raise for what is refused; return the body where it had to be read."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = _read_path(scope), scope["method"]
        _check_host(headers.get("host", ""), self._rules)
        _check_origin(headers, path, method)
        if self._rules.password is not None and path != f"{_API}/startup-events":  # which gradio asks itself
            _check_password(headers.get("authorization", ""), self._rules.password)
        if method in ("GET", "HEAD"):
            _check_read(path)
            return None
        if method != "POST" or not path.startswith(_API):
            raise _RefusedError(404, "the page has nothing there")
        rest = path.removeprefix(_API)
        num_bytes = _read_length(headers)
        if rest == _UPLOAD:
            self._check_upload(num_bytes)
            return None
        if rest not in _WRITE:
            raise _RefusedError(404, "the page has nothing there")
        if num_bytes > MAX_BODY_BYTES:
            raise _RefusedError(413, f"a request has up to {MAX_BODY_BYTES >> 10} kB, this one {num_bytes >> 10}")
        body = await _read_body(receive, num_bytes)
        self._check_files(body)
        return body

    def _check_upload(self, num_bytes: int) -> None:
        """Refuse what is too large, and everything once the folder is full."""
        if num_bytes > MAX_UPLOAD_BYTES + _MULTIPART_BYTES:
            megabytes = MAX_UPLOAD_BYTES >> 20
            raise _RefusedError(
                413, f"The upload has {num_bytes / 2**20:.1f} MB. One request may upload up to {megabytes} MB."
            )
        num_files, stored = _measure_folder(self._rules.folder)
        if stored + num_bytes > MAX_FOLDER_BYTES or num_files >= MAX_FILES:
            raise _RefusedError(
                507,
                f"the page keeps up to {MAX_FILES} files of {MAX_FOLDER_BYTES >> 20} MB together and has {num_files} of "
                f"{stored >> 20} MB: they go a day after they came, or when the page is started again",
            )

    def _check_files(self, body: bytes) -> None:
        """Refuse a request that names a file outside the uploads; the answer is the same whether there is one or not."""
        try:
            content = json.loads(body)
            named = [each["path"] for each in _walk(content) if each.get("path") is not None]
        except (ValueError, RecursionError):
            raise _RefusedError(400, "the request is not JSON that is taken") from None
        for path in named:
            if not isinstance(path, str) or not is_upload(path, self._rules.folder):
                raise _RefusedError(403, "a request may only name files that were uploaded to this page")


def _read_path(scope: "Scope") -> str:
    """Return the path without what differs in spelling alone."""
    path = str(scope["path"])
    return path.rstrip("/") or "/"


def _check_host(host: str, rules: Rules) -> None:
    name = _split_host(host)
    if name in rules.names or (rules.takes_addresses and _is_address(name)):
        return
    raise _RefusedError(421, "this page does not answer under that name")


def _check_origin(headers: dict[str, str], path: str, method: str) -> None:
    """Refuse what another web page sends, except that a link there may lead here."""
    if "origin" in headers and urlsplit(headers["origin"]).netloc.lower() != headers.get("host", "").lower():
        raise _RefusedError(403, "another web page may not use this one")
    is_link = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and not is_link:
        raise _RefusedError(403, "another web page may not use this one")


def _check_password(authorization: str, password: str) -> None:
    scheme, _, encoded = authorization.partition(" ")
    given = b""
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(encoded, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            given = b""
    if not secrets.compare_digest(given, password.encode()):
        raise _RefusedError(401, "this page asks for its password")


def _check_read(path: str) -> None:
    if path in _PAGE or path.startswith(_PARTS):
        return
    rest = path.removeprefix(_API) if path.startswith(f"{_API}/") else ""
    if rest in _READ or rest.startswith("/heartbeat/"):
        return
    # gradio fetches an address that stands there in place of a file
    if rest.startswith("/file=") and "://" not in unquote(rest) and not unquote(rest).startswith("/file=//"):
        return
    raise _RefusedError(404, "the page has nothing there")


def _read_length(headers: dict[str, str]) -> int:
    """Return how long a body is; ASGI servers hold a client to what it announces."""
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not length.isdecimal() or len(length) > 15:
        raise _RefusedError(411, "a request must say how long it is")
    return int(length)


async def _read_body(receive: "Receive", num_bytes: int) -> bytes:
    pieces, total, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _RefusedError(400, "the request broke off")
        pieces.append(message.get("body", b""))
        total += len(pieces[-1])
        more = message.get("more_body", False)
        if total > num_bytes:
            raise _RefusedError(413, "the request is longer than it said")
    return b"".join(pieces)


def _replay(body: bytes, receive: "Receive") -> "Receive":
    """Return what hands a body on that was read already, and then whatever else comes."""
    is_sent = False

    async def receive_again() -> "Message":
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _walk(content: Any, depth: int = 0) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - any JSON
    """Yield every object in a JSON value; ValueError where it is nested deeper than any request of the page."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(content, dict):
        yield content
    for each in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _walk(each, depth + 1)


def _measure_folder(folder: Path) -> tuple[int, int]:
    """Return how many files a folder holds, and their bytes."""
    num_files = num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                num_bytes += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
            except FileNotFoundError:  # deleted just now
                continue
            num_files += 1
    return num_files, num_bytes


def _split_host(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _answer(send: "Send", refused: _RefusedError) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if refused.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="Prompt Diffusion studio", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": refused.reason.encode()})
