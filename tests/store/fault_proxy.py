"""An HTTP reverse proxy that stands before the real S3 server and fails as it is told to, one rule a fault."""

import http.client
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["500", "503", "reset", "cut", "hang", "error in 200", "lost write", "lost answer", "wrong delete"]

_HOP_HEADERS = {"connection", "expect", "keep-alive", "transfer-encoding"}
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
_STATUS_ANSWERS = {
    "500": (500, _ERROR.format("InternalError", "We encountered an internal error.")),
    "503": (503, _ERROR.format("SlowDown", "Please reduce your request rate.")),
    "error in 200": (200, _ERROR.format("InternalError", "We encountered an internal error.")),
    "lost write": (200, ""),
    "wrong delete": (
        200,
        "<DeleteResult><Error><Key>k</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>",
    ),
}


@dataclass
class Rule:
    """The next ``count`` requests of that method, to a path with query that has ``part`` in it, meet the fault."""

    fault: Fault
    method: str
    part: str
    count: int


class FaultProxy:
    """The proxy's rules and its memory; ``requests`` are all that it got, as (method, path with query)."""

    def __init__(self, upstream: str) -> None:
        self.requests: list[tuple[str, str]] = []
        self.num_faults = 0
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self.upstream = urlsplit(upstream).netloc
        self.is_closing = threading.Event()

    def add_fault(self, fault: Fault, method: str, part: str, count: int) -> None:
        """Let the next ``count`` matching requests fail."""
        self._rules.append(Rule(fault, method, part, count))

    def heal(self) -> None:
        """Forget all rules and all requests."""
        self._rules.clear()
        self.requests.clear()
        self.num_faults = 0

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Note a request and return the fault that is due to it."""
        with self._lock:
            self.requests.append((method, path))
            for rule in self._rules:
                if rule.count > 0 and rule.method == method and rule.part in path:
                    rule.count -= 1
                    self.num_faults += 1
                    return rule.fault
        return None


@contextmanager
def serve_fault_proxy(upstream: str) -> Iterator[tuple[FaultProxy, str]]:
    """Give a proxy before the URL ``upstream``, and its own URL."""
    proxy = FaultProxy(upstream)

    class Handler(_Handler):
        pass

    Handler.proxy = proxy
    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield proxy, f"http://127.0.0.1:{server.server_port}"
        finally:
            proxy.is_closing.set()
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Stay silent: clients that give up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a head and its body are two writes: the second would wait for an acknowledgement
    proxy: FaultProxy

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.take_fault(self.command, self.path)
        if fault in _STATUS_ANSWERS:
            status, text = _STATUS_ANSWERS[fault]
            self._answer(status, {"Content-Type": "application/xml"}, text.encode())
        elif fault == "reset":
            self._reset()
        elif fault == "hang":
            self.proxy.is_closing.wait()
            self._reset()
        else:
            self._forward(body, fault)

    do_GET = do_HEAD = do_POST = do_DELETE = do_PUT  # noqa: N815

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        # The signature covers the header Host, so it stays as the client sent it.
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_HEADERS}
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=600)
        upstream.request(self.command, self.path, body=body, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        if fault == "lost answer":
            self._reset()
        elif fault == "cut":
            self._answer(answer.status, dict(answer.getheaders()), content, len(content) // 2)
            self._reset()
        else:
            self._answer(answer.status, dict(answer.getheaders()), content)
        upstream.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, num_bytes: int | None = None) -> None:
        """Send an answer, of its content the first ``num_bytes`` alone if that is given."""
        self.send_response_only(status)
        kept = {name: value for name, value in headers.items() if name.lower() not in _HOP_HEADERS}
        if self.command != "HEAD" or "Content-Length" not in kept:
            kept["Content-Length"] = str(len(content))
        for name, value in kept.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:num_bytes])

    def _reset(self) -> None:
        """Close the connection with a reset instead of an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        return
