"""A URI is joined by single slashes, and only a local one has a path."""

from pathlib import Path

import pytest

from prompt_diffusion.store.uris import join_uri, local_path


@pytest.mark.parametrize(
    ("root", "parts", "joined"),
    [
        ("s3://bucket", ("a", "b.parquet"), "s3://bucket/a/b.parquet"),
        ("s3://bucket/store/", ("/a/", ""), "s3://bucket/store/a"),
        ("/data/store/", ("a",), "/data/store/a"),
        ("file:///data", ("a",), "file:///data/a"),
        ("./outputs/store", ("a",), "./outputs/store/a"),
        ("/", ("a",), "/a"),
        ("/", (), "/"),
    ],
)
def test_uri_is_joined_by_single_slashes(root: str, parts: tuple[str, ...], joined: str) -> None:
    assert join_uri(root, *parts) == joined


def test_only_a_local_uri_has_a_local_path() -> None:
    assert local_path("/data/store") == Path("/data/store")
    assert local_path("file:///data/store") == Path("/data/store")
    assert local_path("s3://bucket/store") is None
