"""Who gets into the page, and with what: other web pages, other names, other routes, too much at once."""

import base64
import json
import os
import socket

import httpx
import pytest

pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")

from prompt_diffusion.settings import Settings
from prompt_diffusion.studio import limits
from prompt_diffusion.studio.door import Door, Rules
from prompt_diffusion.studio.serve import choose_password, serve

JSON = {"content-type": "application/json"}


@pytest.fixture
def uploads(tmp_path):
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


@pytest.fixture
def visit(uploads):
    """Send one request through a door to an application that tells what arrived, and return its answer."""

    async def page(scope, receive, send):
        message = await receive()
        content = {"path": scope["path"], "body": message["body"].decode("latin-1")}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})

    def send(
        method, path, host="localhost:7860", password=None, names=("localhost",), takes_addresses=False, **options
    ):
        import anyio

        rules = Rules(frozenset(names), takes_addresses, uploads, password)

        async def ask():
            transport = httpx.ASGITransport(Door(page, rules))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                return await client.request(method, path, **options)

        return anyio.run(ask)

    return send


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "192.168.1.7", "[::2]"]
)
def test_a_name_that_only_points_here_is_not_answered(visit, host):
    assert visit("GET", "/").status_code == 200
    for method, path in (
        ("GET", "/"),
        ("GET", "/config"),
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/x"),
    ):
        assert visit(method, path, host=host).status_code == 421


def test_a_page_for_others_answers_to_its_addresses_and_its_own_name(visit):
    for host, status in (("192.168.1.7:7860", 200), ("[fe80::1]:7860", 200), ("gpu-box", 200), ("evil.example", 421)):
        assert visit("GET", "/", host=host, names=("gpu-box",), takes_addresses=True).status_code == status


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9999"},  # another program's page on this machine
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_web_page_gets_nothing(visit, headers):
    for method, path in (
        ("GET", "/config"),
        ("GET", "/gradio_api/file=/x"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/queue/join"),
    ):
        assert (
            visit(method, path, headers=headers | JSON, content=b"{}" if method == "POST" else None).status_code == 403
        )


def test_its_own_page_and_a_link_to_it_are_taken(visit):
    own = {"origin": "http://localhost:7860", "sec-fetch-site": "same-origin"}
    assert visit("POST", "/gradio_api/queue/join", headers=own, content=b"{}").status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert visit("GET", "/", headers=link).status_code == 200
    assert visit("GET", "/config", headers=link).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/proxy=http://example.org"),
        ("GET", "/gradio_api/file=http://example.org/a.png"),
        ("GET", "/gradio_api/file=http%3A//example.org/a.png"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/custom_component/1/server/component/index.js"),
        ("GET", "/gradio_api/deep_link"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/call/generate"),
        ("POST", "/gradio_api/api/predict"),
        ("POST", "/login"),
        ("PUT", "/config"),
        ("DELETE", "/gradio_api/upload"),
    ],
)
def test_what_the_page_does_not_use_is_closed(visit, method, path):
    assert visit(method, path).status_code == 404


def test_a_password_guards_everything(visit):
    def ask(path, method="GET", **options):
        return visit(method, path, password="correct horse", **options)

    given = {"authorization": "Basic " + base64.b64encode(b"anybody:correct horse").decode()}
    for path in ("/", "/config", "/gradio_api/file=/x", "/assets/index.js", "/gradio_api/heartbeat/x"):
        answer = ask(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
        for wrong in ("Basic !!", "Basic " + base64.b64encode(b"x:correct hors").decode(), "Bearer correct horse"):
            assert ask(path, headers={"authorization": wrong}).status_code == 401
        assert ask(path, headers=given).status_code == 200
    assert ask("/gradio_api/queue/join", "POST", content=b"{}").status_code == 401


def test_a_page_for_others_always_has_a_password():
    settings = Settings(_env_file=None)
    assert choose_password(settings, "127.0.0.1") == (None, False)
    first, is_drawn = choose_password(settings, "0.0.0.0")
    assert is_drawn
    assert len(first) >= 20
    assert choose_password(settings, "0.0.0.0")[0] != first
    chosen = Settings(studio_password="a password of mine")
    for host in ("127.0.0.1", "0.0.0.0"):
        assert choose_password(chosen, host) == ("a password of mine", False)
    with pytest.raises(ValueError, match="has 5 characters: take at least 12"):
        choose_password(Settings(studio_password="short"), "0.0.0.0")
    with pytest.raises(ValueError, match=r"listens on 0\.0\.0\.0 needs a password"):
        serve(settings, "models:/x/1", "0.0.0.0", 1, "cpu", None, print)


def test_one_request_uploads_one_file_s_worth_and_says_how_much(visit):
    def upload(content, **headers):
        return visit("POST", "/gradio_api/upload", content=content, headers=headers)

    assert upload(bytes(limits.MAX_UPLOAD_BYTES)).status_code == 200
    refused = upload(bytes(3 * limits.MAX_UPLOAD_BYTES))
    assert (refused.status_code, "60.0 MB" in refused.text) == (413, True)

    async def endless():
        yield b"x"

    assert visit("POST", "/gradio_api/upload", content=endless()).status_code == 411


def test_all_uploads_together_are_bounded(visit, uploads, monkeypatch):
    monkeypatch.setattr("prompt_diffusion.studio.uploads.MAX_FOLDER_BYTES", 1000)
    monkeypatch.setattr("prompt_diffusion.studio.uploads.MAX_FILES", 3)
    assert visit("POST", "/gradio_api/upload", content=bytes(1000)).status_code == 200
    (uploads / "a").mkdir()
    (uploads / "a" / "one.png").write_bytes(bytes(600))
    assert visit("POST", "/gradio_api/upload", content=bytes(400)).status_code == 200
    refused = visit("POST", "/gradio_api/upload", content=bytes(401))
    assert (refused.status_code, "MB together" in refused.text) == (507, True)
    for name in ("two", "three"):
        (uploads / name).touch()
    assert visit("POST", "/gradio_api/upload", content=b"").status_code == 507


@pytest.mark.parametrize("depth", [50, 5000, 400_000])
def test_a_request_that_is_no_json_of_ours_is_refused(visit, depth):
    for content in (b"{", b"\xff", b"[" * depth + b"]" * depth):
        assert visit("POST", "/gradio_api/queue/join", content=content).status_code == 400
    assert visit("POST", "/gradio_api/queue/join", content=bytes(limits.MAX_BODY_BYTES + 1)).status_code == 413


def test_a_request_arrives_whole(visit):
    body = json.dumps({"data": ["x" * 1000, {"path": None}]}).encode()
    answer = visit("POST", "/gradio_api/queue/join", content=body).json()
    assert answer == {"path": "/gradio_api/queue/join", "body": body.decode()}


def test_a_request_names_uploaded_files_alone(visit, uploads, tmp_path):
    inside, outside = uploads / "a.png", tmp_path / "secret.png"
    inside.touch()
    outside.touch()
    os.symlink(outside, uploads / "link.png")

    def name(path, **more):
        body = json.dumps({"data": [{"deep": [{"path": path, **more}]}], "event_data": None})
        answer = visit("POST", "/gradio_api/queue/join", content=body.encode())
        return answer.status_code, answer.text

    assert name(str(inside))[0] == 200
    assert name(None)[0] == 200
    answers = {
        name(path, **more)
        for path in (
            str(outside),
            str(tmp_path / "missing.png"),
            str(uploads / ".." / "secret.png"),
            str(uploads / "link.png"),
            str(uploads) + "-and-more/a.png",
            "secret.png",
            "",
            "http://example.org/a.png",
            "file:///etc/hostname",
            "a\0b",
            "/" + "x" * 5000,
            7,
            ["/etc/hostname"],
        )
        for more in ({}, {"meta": {"_type": "gradio.FileData"}}, {"url": "http://example.org/a.png"})
    }
    assert answers == {
        (403, "a request may only name files that were uploaded to this page")
    }  # one answer tells nothing


def test_every_answer_forbids_the_browser_to_ask_elsewhere(visit):
    for answer in (visit("GET", "/"), visit("GET", "/monitoring"), visit("GET", "/", host="evil.example")):
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.timeout(600)
def test_the_running_page_is_behind_the_door(studio):
    port = int(studio.address.rpartition(":")[2])
    assert httpx.get(studio.address).status_code == 200
    assert httpx.get(studio.address, headers={"host": "evil.example"}).status_code == 421
    files = {"files": ("a.png", b"x", "image/png")}
    upload = f"{studio.address}/gradio_api/upload"
    assert httpx.post(upload, files=files, headers={"origin": "http://evil.example"}).status_code == 403
    assert httpx.post(upload, files=files, headers={"origin": studio.address}).status_code == 200
    with socket.socket() as elsewhere:  # it listens on the loopback alone
        elsewhere.settimeout(5)
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            assert elsewhere.connect_ex((address, port)) != 0
