"""A request that is refused, and the response that it gets."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Send


class RefusedError(Exception):
    """A request that goes no further, with its HTTP status and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


async def answer(send: "Send", refused: RefusedError) -> None:
    """Send the response of a refused request."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if refused.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="Prompt Diffusion studio", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": refused.reason.encode()})
