"""Who may ask: by the name that the page was asked for, the web page that asks, and the password."""

import base64
import binascii
import ipaddress
import secrets
from collections.abc import Collection
from urllib.parse import urlsplit

from prompt_diffusion.studio.refusal import RefusedError


def check_host(host: str, names: Collection[str], takes_addresses: bool) -> None:
    """Refuse a request for a page under another name, as DNS rebinding makes it."""
    name = _split_host(host)
    if name in names or (takes_addresses and _is_address(name)):
        return
    raise RefusedError(421, "this page does not answer under that name")


def check_origin(headers: dict[str, str], path: str, method: str) -> None:
    """Refuse requests from other web pages, except for following a link to this one."""
    if "origin" in headers and urlsplit(headers["origin"]).netloc.lower() != headers.get("host", "").lower():
        raise RefusedError(403, "another web page may not use this one")
    is_link = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and not is_link:
        raise RefusedError(403, "another web page may not use this one")


def check_password(authorization: str, password: str) -> None:
    """Refuse a request without the password, by HTTP basic authentication."""
    scheme, _, encoded = authorization.partition(" ")
    given = b""
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(encoded, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            given = b""
    if not secrets.compare_digest(given, password.encode()):
        raise RefusedError(401, "this page asks for its password")


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
