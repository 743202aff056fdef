"""How patient we are with an object store: bounded times and tries, then one error that names the URI and the reason.

The client itself retries a request (a 5xx, a reset, no answer). Retried here is only what it cannot see: an answer that
breaks off in its body, an object that is missing although the store said 200.
"""

import logging
import random
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, TypeVar

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

NUM_TRIES: Final = 5
# A store that never answers costs 5 * 30 s and at most 15 s of pauses; s3fs by default waits 25 * 15 s, 125 in a read.
_CONNECT_TIMEOUT_SECONDS = 10.0
_READ_TIMEOUT_SECONDS = 30.0
_REQUEST_TRIES = 5
_FIRST_PAUSE_SECONDS = 0.1

# S3's codes of an upload that is to be sent again (AWS answers 409 while another create of the key is in flight), and of
# one that an earlier try of the same upload may have ended already, its answer lost.
_RESEND_CODES = ("ConditionalRequestConflict", "OperationAborted", "BadDigest", "XAmzContentSHA256Mismatch")
_LOST_CONDITION_CODES = ("PreconditionFailed", "412")
_ENDED_UPLOAD_CODES = (*_LOST_CONDITION_CODES, "NoSuchUpload")

_DENIED_CODES = ("AccessDenied", "Forbidden", "403")
_FORBIDDEN = 403

_KINDS = (FileNotFoundError, FileExistsError, PermissionError)
_Errors = tuple[type[Exception], ...]


class StoreError(OSError):
    """An object store failed for longer than we are patient; a type of its own, for Arrow reports damage as OSError."""


def build_client_config() -> dict[str, Any]:
    """Return what botocore's ``Config`` takes: explicit, so that no variable of the environment changes it."""
    return {
        "connect_timeout": _CONNECT_TIMEOUT_SECONDS,
        "read_timeout": _READ_TIMEOUT_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": _REQUEST_TRIES},
    }


def ask_store(uri: str, verb: str, call: Callable[[], _Answer], *, failures: _Errors, broken: _Errors) -> _Answer:
    """Return what ``call`` does, again after a ``broken`` answer; ``failures`` become StoreError ``cannot {verb} {uri}``.

    A FileNotFoundError, FileExistsError or PermissionError stays one; the store's own error is the cause.
    """
    for attempt in range(NUM_TRIES):
        try:
            return call()
        except failures as error:
            if isinstance(error, broken) and attempt < NUM_TRIES - 1:
                logger.warning("cannot %s %s: %s: tried again", verb, uri, describe_error(error))
                _pause(attempt)
                continue
            other = PermissionError if is_denied(error) else StoreError
            kind = next((kind for kind in _KINDS if isinstance(error, kind)), other)
            raise kind(f"cannot {verb} {uri}: {describe_error(error)}") from error
    raise AssertionError("the last try returns or raises")


def upload_until_stored(
    uri: str, num_bytes: int, send: Callable[[str], object], look: Callable[[], tuple[int, str | None] | None]
) -> bool:
    """Call ``send(mark)`` until ``look`` finds bytes and mark there; False where ``send`` is a create that another run has won.

    Neither an answer nor its absence proves anything: a store may say 200 and keep nothing or half, or keep the object
    but lose the answer, so that the client's own retry of a create meets the object of its first try. So an upload
    carries a mark in the object's metadata, and what is there afterwards decides. Comparing contents would not do: of
    two runs that create the same bytes, only one may be told that it won.
    """
    mark = uuid.uuid4().hex
    stored = None
    for attempt in range(NUM_TRIES):
        if attempt:
            _pause(attempt - 1)
        code = None
        try:
            send(mark)
        except OSError as error:
            # A lost condition is FileExistsError only where the server's answer names the header, else plain OSError.
            code = _LOST_CONDITION_CODES[0] if isinstance(error, FileExistsError) else _read_error_code(error)
            is_last = attempt == NUM_TRIES - 1
            if code not in _ENDED_UPLOAD_CODES and (code not in _RESEND_CODES or is_last):
                raise
        if code not in _RESEND_CODES:
            stored = look()
            if stored == (num_bytes, mark):
                return True
            if code in _LOST_CONDITION_CODES and (stored is None or stored[1] != mark):
                return False
            logger.warning("%s %s: written again", uri, _describe_stored(stored, num_bytes))
    raise StoreError(
        f"{uri} {_describe_stored(stored, num_bytes)}, though the store answered {NUM_TRIES} times with success"
    )


def describe_error(error: BaseException) -> str:
    """Return the reason of a failure in one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def is_denied(error: BaseException | None) -> bool:
    """Say whether a store refused one object to us (403), which is not the same as credentials that it does not know."""
    if _read_error_code(error) in _DENIED_CODES:
        return True
    while error is not None:
        if getattr(error, "status", None) == _FORBIDDEN:
            return True
        error = error.__cause__
    return False


def _pause(attempt: int) -> None:
    """Sleep after the failed try number ``attempt``, counted from 0: twice as long each time, with jitter."""
    time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1.5))


def _read_error_code(error: BaseException | None) -> str | None:
    """Return S3's own code of an error or of what caused it, if it has one."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code"))
        error = error.__cause__
    return None


def _describe_stored(stored: tuple[int, str | None] | None, num_bytes: int) -> str:
    if stored is None:
        return f"is not there after a write of {num_bytes} bytes"
    if stored[0] != num_bytes:
        return f"has {stored[0]} bytes after a write of {num_bytes}"
    return f"holds another content after a write of {num_bytes} bytes"
