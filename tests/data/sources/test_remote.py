"""Sources on a web server or in a foreign store: read where that can be done, else refused in one sentence."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_diffusion.data.ingest import IngestConfig, build_source
from prompt_diffusion.data.records import ImagePair
from prompt_diffusion.data.sources.digest import digest_files
from prompt_diffusion.data.transforms import encode_png
from prompt_diffusion.store.retries import is_denied
from prompt_diffusion.store.storage import list_sizes


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder: pages that list it, and files with their sizes where ``tells_sizes``."""

    tells_sizes = True
    denied = ""

    def do_GET(self) -> None:
        """Refuse the file that is denied."""
        if self.denied and self.path.endswith(self.denied):
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def send_header(self, keyword: str, value: str) -> None:
        """Leave the size out where it is not told."""
        if self.tells_sizes or keyword != "Content-Length":
            super().send_header(keyword, value)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """Give the address of a folder with an image folder in ``images`` and Parquet rows in ``rows``."""
    pytest.importorskip("aiohttp")
    (tmp_path / "images").mkdir()
    png = encode_png(np.full((16, 16, 3), 77, np.uint8))
    (tmp_path / "images" / "a.png").write_bytes(png)
    (tmp_path / "images" / "metadata.csv").write_text("file_name,caption\na.png,grey\ngone.png,grey\n")
    (tmp_path / "rows").mkdir()
    image = {"bytes": png, "path": None}
    row = {
        "original_prompt": "a",
        "original_image": image,
        "edit_prompt": "b",
        "edited_prompt": "c",
        "edited_image": image,
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows" / "train-0.parquet")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    fsspec.get_filesystem_class("http").clear_instance_cache()


def build(kind: str, uri: str) -> object:
    return build_source(IngestConfig.model_validate({"source": {"kind": kind, "uri": uri}, "image_size": 16}))


def test_a_web_servers_listing_without_sizes_is_read(site: str, tmp_path: Path) -> None:
    for kind, folder, reasons in (
        ("image_folder", "images", ["gone.png is missing"]),
        ("instruct_pix2pix", "rows", []),
    ):
        source = build(kind, f"{site}/{folder}")
        items = list(source.read(source.plan()))  # type: ignore[attr-defined]
        assert sum(isinstance(item, ImagePair) for item in items) == 1
        assert [item.reason for item in items if not isinstance(item, ImagePair)] == reasons
        here = build(kind, str(tmp_path / folder))
        assert source.digest() == here.digest()  # type: ignore[attr-defined]


def test_a_file_that_a_server_denies_is_one_reject(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images" / "b.png").write_bytes((tmp_path / "images" / "a.png").read_bytes())
    (tmp_path / "images" / "metadata.csv").write_text("file_name,caption\na.png,grey\nb.png,grey\n")
    monkeypatch.setattr(Quiet, "denied", "b.png")
    source = build("image_folder", f"{site}/images")
    pair, reject = source.read(source.plan())  # type: ignore[attr-defined]
    assert (pair.sample_id, reject.sample_id) == ("a.png", "b.png")
    assert "b.png cannot be read" in reject.reason
    assert "Forbidden" in reject.reason


@pytest.mark.parametrize(
    ("code", "is_of_one_object"),
    [
        ("AccessDenied", True),
        ("403", True),
        ("ExpiredToken", False),
        ("InvalidAccessKeyId", False),
        ("SlowDown", False),
    ],
)
def test_s3_denies_one_object_or_the_caller(code: str, is_of_one_object: bool) -> None:
    client_error = pytest.importorskip("botocore.exceptions").ClientError
    error = PermissionError("cannot read s3://bucket/a.png")
    error.__cause__ = client_error({"Error": {"Code": code, "Message": "no"}}, "GetObject")
    assert is_denied(error) is is_of_one_object


def test_a_server_that_tells_no_sizes_is_refused_in_one_sentence_or_read_whole(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quiet, "tells_sizes", False)
    with pytest.raises(
        ValueError, match=r"does not say how large train-0\.parquet is: copy the data to a folder or to S3"
    ):
        list_sizes(f"{site}/rows")
    assert digest_files(f"{site}/images", ["a.png"]) == digest_files(str(tmp_path / "images"), ["a.png"])


def test_a_folder_that_a_server_has_not_is_refused_in_one_sentence(site: str) -> None:
    with pytest.raises(ValueError, match=f"there is no folder {site}/none"):
        build("image_folder", f"{site}/none")


@pytest.mark.parametrize("kind", ["image_folder", "instruct_pix2pix"])
@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("abfs", "adlfs"), ("nonesuch", "nonesuch")])
def test_a_scheme_whose_package_is_missing_is_refused_in_one_sentence(kind: str, scheme: str, package: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"the package {package} is installed")
    with pytest.raises(ValueError, match=f"^cannot read {scheme}://bucket/data[^\n]*: [^\n]*$") as refused:
        build(kind, f"{scheme}://bucket/data")
    assert package in str(refused.value)
