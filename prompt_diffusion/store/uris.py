"""URIs: a local path, ``file://...`` or ``s3://bucket/key``, always a ``str``."""

from pathlib import Path


def join_uri(root: str, *parts: str) -> str:
    """Return ``root`` and the parts joined by single slashes."""
    scheme, separator, rest = root.rpartition("://")
    absolute = "/" if rest.startswith("/") else ""
    stripped = (part.strip("/") for part in (rest, *parts))
    return scheme + separator + absolute + "/".join(part for part in stripped if part)


def local_path(uri: str) -> Path | None:
    """Return the path of a local URI, None for a remote one."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri).expanduser()
