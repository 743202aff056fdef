"""The file systems of remote URIs: opened, asked with retries, uploaded to; the only module that imports fsspec and s3fs.

S3 finds its endpoint and keys in the standard AWS variables (``AWS_ENDPOINT_URL``). A store that fails is retried as
``retries.py`` says, then StoreError names the URI and the reason.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from prompt_diffusion.store.retries import ask_store, build_client_config, describe_error, upload_until_stored

_Answer = TypeVar("_Answer")

_MARK_NAME = "upload"


def open_remote(uri: str) -> tuple[Any, str]:
    """Return fsspec's file system of a remote URI, and the path in it; ValueError where the scheme's package is missing."""
    try:
        if uri.startswith("s3://"):
            return open_s3(uri)
        filesystem, key = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise ValueError(f"cannot read {uri}: {describe_error(error)}") from error
    except ValueError as error:  # an unknown scheme, which fsspec names without the address
        raise ValueError(str(error) if uri in str(error) else f"cannot read {uri}: {error}") from error
    return filesystem, str(key)


def open_s3(uri: str) -> tuple[Any, str]:
    """Return the S3 file system and ``bucket/key``; ValueError for any other scheme, since only these two are written."""
    key = uri.removeprefix("s3://").strip("/")
    if not uri.startswith("s3://") or not key:
        raise ValueError(f"cannot write to {uri}: a store is a folder or s3://bucket/prefix")
    # Listings must not be remembered: other processes write here too.
    filesystem = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=build_client_config())
    # Its own retries would multiply botocore's: 5 times as many requests before a write fails, 25 times for a read.
    filesystem.retries = 1
    return filesystem, key


def open_remote_file(uri: str) -> Any:  # noqa: ANN401
    """Return an open file of a remote URI; on S3 each range is read with the same retries as a whole file."""
    filesystem, key = open_remote(uri)
    file = ask(uri, "read", lambda: filesystem.open(key, "rb"))
    if uri.startswith("s3://"):
        fetch = file.cache.fetcher
        file.cache.fetcher = lambda start, end: ask(uri, "read", lambda: fetch(start, end))
    return file


def ask(uri: str, verb: str, call: Callable[[], _Answer]) -> _Answer:
    """Return what ``call`` gets from a remote store; StoreError ``cannot {verb} {uri}: ...`` once patience ends."""
    if not uri.startswith("s3://"):  # each of fsspec's file systems fails in its own ways
        return ask_store(uri, verb, call, failures=(Exception,), broken=())
    try:
        from aiobotocore.response import AioReadTimeoutError  # type: ignore[import-untyped]
        from aiohttp import ClientError, ClientPayloadError
        from botocore.exceptions import (  # type: ignore[import-untyped]
            BotoCoreError,
            IncompleteReadError,
            ResponseStreamingError,
        )
        from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
    except ModuleNotFoundError:  # without the extra 's3'
        return ask_store(uri, verb, call, failures=(OSError,), broken=())
    # No answer at all is not among the broken ones: the client has waited for it more than once already.
    broken = (AioReadTimeoutError, ClientPayloadError, IncompleteReadError, ResponseStreamingError, ResponseParserError)
    return ask_store(
        uri, verb, call, failures=(OSError, BotoCoreError, ClientError, ResponseParserError), broken=broken
    )


def upload(uri: str, num_bytes: int, send: Callable[[Any, str, dict[str, Any]], object]) -> bool:
    """Send an object until it is there; False where ``send`` is a create and another object is there."""
    filesystem, key = open_s3(uri)
    bucket, _, name = key.partition("/")

    def send_marked(mark: str) -> None:
        ask(uri, "write", lambda: send(filesystem, key, {"Metadata": {_MARK_NAME: mark}}))

    def look() -> tuple[int, str | None] | None:
        try:
            head = ask(uri, "look up", lambda: filesystem.call_s3("head_object", Bucket=bucket, Key=name))
        except FileNotFoundError:
            return None
        return int(head["ContentLength"]), head.get("Metadata", {}).get(_MARK_NAME)

    return upload_until_stored(uri, num_bytes, send_marked, look)


def check_bucket(uri: str) -> None:
    """Raise OSError if the bucket does not exist: some servers create an unknown one on the first write to it."""
    filesystem, key = open_s3(uri)
    bucket = key.split("/")[0]
    try:
        ask(f"s3://{bucket}", "look up", lambda: filesystem.info(bucket))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no bucket {bucket!r}") from None
