"""MLflow serves what is registered: base64 images in, the pipeline's own image out."""

import base64
import io
import json
import os
import signal
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from prompt_diffusion.data.transforms import decode_image, encode_png
from prompt_diffusion.registry import ModelFacts, load, register_folder
from tests.sharing import PATIENCE_SECONDS, find_free_ports, is_answering, kill_server, start_server


def to_base64(data):
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def served(settings, pipeline_folder):
    return register_folder(
        pipeline_folder, settings, name="served", alias="challenger", facts=ModelFacts(title="A pipeline to serve")
    )


@pytest.fixture(scope="module")
def pyfunc(settings, served):
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(settings.tracking_uri)
    mlflow.set_registry_uri(settings.tracking_uri)
    try:
        yield mlflow.pyfunc.load_model("models:/served@challenger")
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])


@pytest.fixture(scope="module")
def row():
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(3)]
    names = ("example_source", "example_target", "query")
    return {name: to_base64(encode_png(image)) for name, image in zip(names, images, strict=True)}


def generate(settings, served, row, prompt, seed, steps, **options):
    """Return what the pipeline itself makes of a row."""
    source, target, query = (decode_image(base64.b64decode(row[name])) for name in row)
    generator = torch.Generator().manual_seed(seed)
    options |= {"num_inference_steps": steps, "generator": generator}
    return load(served.uri, settings)(prompt, (source, target), query, output_type="uint8", **options).images[0]


def predict(pyfunc, rows, **params):
    import pandas as pd

    return [decode_image(base64.b64decode(text)) for text in pyfunc.predict(pd.DataFrame(rows), params=params)["image"]]


def test_a_server_answers_a_post_with_the_pipelines_own_image(settings, served, row, tmp_path):
    port = 0

    def build_command():
        nonlocal port
        (port,) = find_free_ports()
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        return [*command, "-m", "models:/served@challenger", "--host", "127.0.0.1", "--port", str(port)]

    # MLflow starts uvicorn by its name
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"MLFLOW_TRACKING_URI": settings.tracking_uri, "PATH": path, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "serve.log"
    server = start_server(build_command, environment, log, lambda: is_answering(f"http://127.0.0.1:{port}/ping"))
    try:
        params = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 7}
        status, answer = post(port, {"dataframe_records": [{**row, "prompt": "a red cube"}], "params": params})
        assert status == 200, answer
        image = decode_image(base64.b64decode(answer["predictions"][0]["image"]))
        np.testing.assert_array_equal(image, generate(settings, served, row, "a red cube", 7, 2, guidance_scale=3.0))
        status, answer = post(port, {"dataframe_records": [{**row, "query": "bm8="}]})
        assert status == 400
        assert answer["message"].endswith("Error: query of row 0: the image cannot be decoded: not an image file")
        assert "Traceback" not in json.dumps(answer)
    finally:
        kill_server(server)


def post(port, content):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_row_does_not_depend_on_the_rows_beside_it(settings, served, pyfunc, row):
    other = {**row, "query": row["example_source"]}
    rows = [{**row, "prompt": "", "negative_prompt": None}, {**other, "prompt": "a blue ball", "negative_prompt": "x"}]
    both = predict(pyfunc, rows, num_inference_steps=1, seed=3)
    alone = predict(pyfunc, rows[1:], num_inference_steps=1, seed=3)
    np.testing.assert_array_equal(both[1], alone[0])
    np.testing.assert_array_equal(both[0], generate(settings, served, row, "", 3, 1))
    assert not np.array_equal(alone[0], predict(pyfunc, rows[1:], num_inference_steps=1, seed=4)[0])


def test_images_may_be_of_any_size_and_kind(pyfunc, row):
    buffer = io.BytesIO()
    Image.new("L", (70, 40), 90).save(buffer, format="JPEG")
    rows = [{**row, "query": f"data:image/jpeg;base64,{to_base64(buffer.getvalue())}"}]
    (image,) = predict(pyfunc, rows, num_inference_steps=1)
    assert image.shape == (32, 32, 3)


def test_base64_may_have_line_breaks(pyfunc, row):
    broken = {name: base64.encodebytes(base64.b64decode(text)).decode() for name, text in row.items()}
    assert any("\n" in text.strip() for text in broken.values())
    whole, other = (predict(pyfunc, [each], num_inference_steps=1)[0] for each in (row, broken))
    np.testing.assert_array_equal(whole, other)


def test_models_of_others_in_the_same_process_keep_mlflows_own_manners(pyfunc):
    import mlflow
    from mlflow.types.schema import ParamSchema, ParamSpec

    theirs = ParamSchema([ParamSpec("temperature", "double", 1.0)])
    _, params = mlflow.pyfunc._validate_prediction_input("x", {"unheard": 1}, None, theirs)
    assert params == {"temperature": 1.0}


def large_png():
    """A few kilobytes that would be 100 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, format="PNG")
    return to_base64(buffer.getvalue())


def wide_png():
    """Of another shape than the example source."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32)).save(buffer, format="PNG")
    return to_base64(buffer.getvalue())


@pytest.mark.parametrize(
    ("change", "params", "says"),
    [
        ({"query": "!!"}, {}, "query of row 0 is not base64"),
        ({"query": ""}, {}, "query of row 0: the image is empty"),
        ({"example_source": "bm8="}, {}, "example_source of row 0: the image cannot be decoded: not an image file"),
        ({"example_target": large_png()}, {}, "example_target of row 0: the image has 10000 x 10000 pixels, more than"),
        ({"example_target": wide_png()}, {}, "the example pair of row 0: its source has "),
        ({"query": "A" * (23 << 20)}, {}, "query of row 0 is longer than 16 MiB"),
        ({"prompt": "x" * 5000}, {}, "prompt of row 0 is a text of up to 2000 characters"),
        (
            {},
            {"num_inference_steps": 0},
            "params.num_inference_steps: Input should be greater than or equal to 1, got 0",
        ),
        ({}, {"guidance_scale": float("nan")}, "params.guidance_scale: Input should be a finite number, got nan"),
        ({}, {"num_steps": 3}, "unknown params: num_steps; a request may have guidance_scale, num_inference_steps"),
        ({"negativ_prompt": "x"}, {}, "unknown columns: negativ_prompt; a request may have prompt"),
        ({}, {"seed": -1}, "params.seed: Input should be greater than or equal to 0, got -1"),
    ],
)
def test_what_a_request_gets_wrong_is_said_in_one_sentence(pyfunc, row, change, params, says):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as caught:
        predict(pyfunc, [{**row, "prompt": "", **change}], **params)
    assert caught.value.get_http_status_code() == 400
    assert caught.value.message.startswith(says)
    assert "\n" not in caught.value.message


def test_more_rows_than_are_taken_at_once_are_refused(pyfunc, row):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="a request has 1 to 16 rows, this one has 17"):
        predict(pyfunc, [row] * 17)


def test_the_signature_names_every_column_and_parameter(pyfunc):
    signature = pyfunc.metadata.signature
    assert signature.inputs.required_input_names() == ["example_source", "example_target", "query"]
    assert signature.inputs.optional_input_names() == ["prompt", "negative_prompt"]
    assert {param.name: param.default for param in signature.params.params} == {
        "guidance_scale": None,
        "num_inference_steps": None,
        "controlnet_conditioning_scale": None,
        "seed": 0,
    }
    assert signature.outputs.input_names() == ["image"]


@pytest.mark.parametrize(("rows", "steps"), [(16, 101), (2, 1000)])
def test_rows_times_steps_are_bounded(pyfunc, row, rows, steps):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=f"up to 1600 steps over all its rows, this one {rows} x {steps}"):
        predict(pyfunc, [row] * rows, num_inference_steps=steps)


def run_in_thread(model, row, rows, steps):
    """Send a request in a thread; return the thread, and where its result or error will stand."""
    import threading

    import pandas as pd

    outcome = []

    def run():
        try:
            outcome.append(model.predict(None, pd.DataFrame([row] * rows), {"num_inference_steps": steps}))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def test_a_sigterm_ends_a_request_at_its_next_step_and_still_reaches_the_server(pyfunc, row):
    from mlflow.exceptions import MlflowException

    from prompt_diffusion.registry.serving import ServedModel

    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        model = ServedModel()
        model.load_context(pyfunc._model_impl.context)
        thread, outcome = run_in_thread(model, row, 16, 100)
        signal.raise_signal(signal.SIGTERM)
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]
    (error,) = outcome
    assert isinstance(error, MlflowException)
    assert (error.get_http_status_code(), error.message) == (503, "the server is ending: send the request again later")


def test_a_request_that_the_server_has_given_up_stops_and_lets_the_next_one_in(pyfunc, row, monkeypatch):
    from mlflow.exceptions import MlflowException

    from prompt_diffusion.registry.serving import ServedModel

    model = ServedModel()
    model.load_context(pyfunc._model_impl.context)
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "0")  # given up at once
    thread, outcome = run_in_thread(model, row, 16, 100)
    thread.join()
    (error,) = outcome
    assert isinstance(error, MlflowException)
    assert (error.get_http_status_code(), "longer than the server waits" in error.message) == (503, True)
    model._lock.acquire()  # another request is under way, and this one's time ends while it waits
    try:
        thread, outcome = run_in_thread(model, row, 1, 1)
        thread.join()
    finally:
        model._lock.release()
    assert "longer than the server waits" in outcome[0].message
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "100000")
    thread, outcome = run_in_thread(model, row, 1, 1)
    thread.join()
    assert len(decode_image(base64.b64decode(outcome[0]["image"][0]))) == 32


def test_no_handler_is_left_where_nothing_handles_the_signal(pyfunc):
    from prompt_diffusion.registry.serving import ServedModel

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        ServedModel().load_context(pyfunc._model_impl.context)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
