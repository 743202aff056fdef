"""Files of the hub: whether this machine has them, and getting them without a long wait where there is no network."""

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


def is_cached(repository: str, path: str, revision: str) -> bool:
    """Say whether the hub's own cache holds a file, without a request."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, path, revision=revision), str)


def download_file(repository: str, path: str, revision: str) -> Path:
    """Return a file of a pinned revision, from the hub's own cache or the hub; OSError where it cannot be obtained."""
    from huggingface_hub import constants, hf_hub_download

    # Without a network the hub's client would try six times in half a minute; behind a proxy, the proxy looks names up.
    if not (is_cached(repository, path, revision) or constants.HF_HUB_OFFLINE or getproxies()):
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    return Path(hf_hub_download(repository, path, revision=revision))
