"""A folder and S3 behave alike; a create has one winner; a short write and a useless store are found out."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prompt_diffusion
from prompt_diffusion.store.retries import NUM_TRIES
from prompt_diffusion.store.storage import (
    check_writable,
    create_bytes,
    delete_folder,
    exists,
    list_files,
    list_sizes,
    open_input,
    read_bytes,
    write_bytes,
    write_from,
)
from prompt_diffusion.store.uris import join_uri


def test_written_bytes_are_read_and_listed(store_root: str) -> None:
    write_bytes(join_uri(store_root, "b", "two.bin"), b"22")
    write_bytes(join_uri(store_root, "a.bin"), b"")
    write_bytes(join_uri(store_root, "b", "one.bin"), b"1")
    assert read_bytes(join_uri(store_root, "b", "two.bin")) == b"22"
    assert list_sizes(store_root) == {"a.bin": 0, "b/one.bin": 1, "b/two.bin": 2}
    assert list_files(store_root) == ["a.bin", "b/one.bin", "b/two.bin"]
    assert list_files(join_uri(store_root, "b")) == ["one.bin", "two.bin"]


def test_listing_bears_files_that_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "stays").write_bytes(b"1")
    is_done = threading.Event()

    def churn() -> None:
        goers = [tmp_path / f"folder-{number}" / "goes" for number in range(20)]
        while not is_done.is_set():
            for file in goers:
                file.parent.mkdir()
                file.write_bytes(b"22")
            for file in goers:
                file.unlink()
                file.parent.rmdir()

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        try:
            listings = [list_sizes(str(tmp_path)) for _ in range(300)]
        finally:
            is_done.set()
        churning.result()
    assert all(sizes["stays"] == 1 for sizes in listings)
    assert any(len(sizes) > 1 for sizes in listings)


def test_write_replaces_the_whole_file(store_root: str) -> None:
    uri = join_uri(store_root, "file")
    write_bytes(uri, b"a long first content")
    write_bytes(uri, b"short")
    assert read_bytes(uri) == b"short"
    assert list_files(store_root) == ["file"]


def test_local_file_is_written_whole(store_root: str, tmp_path: Path) -> None:
    source = tmp_path / "weights.bin"
    source.write_bytes(os.urandom(3_000_000))
    write_from(join_uri(store_root, "deep", "weights.bin"), source)
    assert read_bytes(join_uri(store_root, "deep", "weights.bin")) == source.read_bytes()


def test_absent_file_is_named(store_root: str) -> None:
    uri = join_uri(store_root, "absent.bin")
    assert not exists(uri)
    assert list_files(uri) == []
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.bin"):
        read_bytes(uri)


def test_file_and_folder_exist_but_no_prefix_of_a_name(store_root: str) -> None:
    write_bytes(join_uri(store_root, "folder", "file"), b"1")
    assert exists(join_uri(store_root, "folder", "file"))
    assert exists(join_uri(store_root, "folder"))
    assert not exists(join_uri(store_root, "fol"))
    assert list_files(join_uri(store_root, "fol")) == []


def test_parquet_is_read_in_place(store_root: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": range(100)}), sink, row_group_size=10)
    write_bytes(join_uri(store_root, "t.parquet"), sink.getvalue().to_pybytes())
    with open_input(join_uri(store_root, "t.parquet")) as file:
        assert pq.ParquetFile(file).read_row_group(7)["x"].to_pylist() == list(range(70, 80))


def test_deleted_folder_is_gone_and_its_neighbour_stays(store_root: str) -> None:
    for name in ("a/1", "a/b/2", "ab/3"):
        write_bytes(join_uri(store_root, name), b"x")
    delete_folder(join_uri(store_root, "a"))
    delete_folder(join_uri(store_root, "never-there"))
    assert list_files(store_root) == ["ab/3"]


def test_of_many_concurrent_creates_one_wins_and_its_bytes_stay(store_root: str) -> None:
    uri = join_uri(store_root, "prize")
    contents = [f"run {index}".encode() for index in range(16)]
    start = threading.Barrier(len(contents))

    def create(content: bytes) -> bool:
        start.wait()
        return create_bytes(uri, content)

    with ThreadPoolExecutor(len(contents)) as pool:
        won = list(pool.map(create, contents))
    assert won.count(True) == 1
    assert read_bytes(uri) == contents[won.index(True)]
    assert list_files(store_root) == ["prize"]


def test_writable_store_is_left_as_it_was(store_root: str) -> None:
    write_bytes(join_uri(store_root, "kept"), b"x")
    check_writable(store_root)
    assert list_files(store_root) == ["kept"]


def test_file_as_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot write to the store .*/file: (Not a directory|File exists)"):
        check_writable(str(tmp_path / "file"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and user ids")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    # The superuser may write anywhere, so a child takes the identity of nobody.
    readable, writable = os.pipe()
    tmp_path.chmod(0o555)
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            check_writable(str(tmp_path))
            os.write(writable, b"accepted")
        except ValueError as error:
            os.write(writable, str(error).encode())
        finally:
            os._exit(0)
    os.close(writable)
    os.waitpid(child, 0)
    tmp_path.chmod(0o755)
    assert os.read(readable, 1000).decode() == f"cannot write to the store {tmp_path}: Permission denied"


def test_unknown_bucket_is_refused(s3_server: str) -> None:
    with pytest.raises(ValueError, match=r"cannot write to the store s3://nowhere/store: there is no bucket 'nowhere'"):
        check_writable("s3://nowhere/store")


def test_s3_without_its_extra_is_refused_with_the_extra_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['s3fs'] = None\n"
        "from prompt_diffusion.store.storage import check_writable\n"
        "try:\n    check_writable('s3://bucket/store')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    checkout = Path(prompt_diffusion.__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=checkout)
    assert answer.stdout.startswith("cannot write to the store s3://bucket/store: install the extra 's3'")


@pytest.mark.parametrize("root", ["s3://", "gs://bucket/store", "https://host/store"])
def test_store_that_is_neither_a_folder_nor_s3_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match=r"cannot write to .*: a store is a folder or s3://bucket/prefix"):
        check_writable(root)


def test_wrong_keys_are_refused_with_the_reason(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(ValueError, match=r"cannot write to the store s3://tests/x: \w+"):
            check_writable("s3://tests/x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


class _ScriptedAnswers(BaseHTTPRequestHandler):
    """Answer each PUT from a script: the answers that no healthy server gives on request."""

    protocol_version = "HTTP/1.1"
    script: list[tuple[int, str]]
    stored_bytes: int
    mark: str = ""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.script.pop(0)
        type(self).mark = self.headers["x-amz-meta-upload"]
        self._answer(status, body.encode())

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.stored_bytes))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("x-amz-meta-upload", self.mark if self.stored_bytes else "another's")
        self.end_headers()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def scripted_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_ScriptedAnswers]]:
    s3fs = pytest.importorskip("s3fs", reason="no S3 client: the package s3fs is not installed")

    class Answers(_ScriptedAnswers):
        script: list[tuple[int, str]] = []
        stored_bytes = 0

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield Answers
        server.shutdown()
        s3fs.S3FileSystem.clear_instance_cache()


_LOST = "<Error><Code>PreconditionFailed</Code><Message>held</Message>{}</Error>"
_CONFLICT = "<Error><Code>ConditionalRequestConflict</Code><Message>in flight</Message></Error>"


@pytest.mark.parametrize("condition", ["", "<Condition>If-None-Match</Condition>"])
def test_lost_condition_is_no_error_whether_or_not_the_server_names_the_header(
    scripted_s3: type[_ScriptedAnswers], condition: str
) -> None:
    scripted_s3.script = [(412, _LOST.format(condition))]
    assert create_bytes("s3://bucket/key", b"data") is False


def test_create_asks_again_while_another_create_is_in_flight(scripted_s3: type[_ScriptedAnswers]) -> None:
    scripted_s3.script = [(409, _CONFLICT), (409, _CONFLICT), (200, "")]
    scripted_s3.stored_bytes = 4
    assert create_bytes("s3://bucket/key", b"data") is True
    assert scripted_s3.script == []


def test_create_that_is_forbidden_is_an_error(scripted_s3: type[_ScriptedAnswers]) -> None:
    scripted_s3.script = [(403, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>")]
    with pytest.raises(PermissionError):
        create_bytes("s3://bucket/key", b"data")


@pytest.mark.parametrize("write", [write_bytes, create_bytes])
def test_upload_that_stored_another_size_is_an_error(scripted_s3: type[_ScriptedAnswers], write: object) -> None:
    assert callable(write)
    scripted_s3.script = [(200, "")] * NUM_TRIES
    scripted_s3.stored_bytes = 2
    with pytest.raises(OSError, match="s3://bucket/key has 2 bytes after a write of 4"):
        write("s3://bucket/key", b"data")
