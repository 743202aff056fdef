"""A registered model behind MLflow's scoring server: base64 images in, base64 images out.

Loaded by ``mlflow.pyfunc`` alone (see ``model_code.py``). The weights are safetensors beside it; the code is this package's.
"""

import base64
import binascii
import math
import signal
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT, MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema
from pydantic import Field, ValidationError

from prompt_diffusion.data.transforms import Pixels, check_pair_shape, decode_image, encode_png, resize_image
from prompt_diffusion.frozen import FrozenModel, say_first_error
from prompt_diffusion.registry.cache import check_folder

if TYPE_CHECKING:
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

IMAGE_COLUMNS = ("example_source", "example_target", "query")
MAX_IMAGE_BYTES = 16 << 20
MAX_ROWS = 16
MAX_TEXT = 2000
MAX_ROW_STEPS = 1600
"""Denoising steps of all rows of a request together: 16 rows of the published 100."""
DIGEST_KEY = "digests_sha256"
"""The entry of the model's configuration that pins its files."""


class Params(FrozenModel):
    """What a request may set beside its rows; None is the model's own default."""

    guidance_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    """Guidance weight; 1 or less is none."""
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps."""
    controlnet_conditioning_scale: float | None = Field(default=None, ge=0, le=10, allow_inf_nan=False)
    """Weight of what the images say."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of every row: an image depends on its row and the seed alone."""


def build_signature() -> ModelSignature:
    """Return what a request holds and what an answer does: images are base64 of PNG or JPEG files."""
    columns = [ColSpec("string", "prompt", required=False), ColSpec("string", "negative_prompt", required=False)]
    columns += [ColSpec("string", name) for name in IMAGE_COLUMNS]
    kinds = {float | None: "double", int | None: "long", int: "long"}
    params = [
        ParamSpec(name, kinds[field.annotation], field.default)  # type: ignore[index]
        for name, field in Params.model_fields.items()
    ]
    return ModelSignature(
        inputs=Schema(columns), outputs=Schema([ColSpec("string", "image")]), params=ParamSchema(params)
    )


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A pipeline as MLflow calls it."""

    _pipeline: "PromptDiffusionPipeline"

    def load_context(self, context: Any) -> None:  # noqa: ANN401 - MLflow's own class
        """Load the pipeline beside the code, its files checked; on a GPU where there is one."""
        refuse_unknown_names()
        from prompt_diffusion.device import AUTO, choose_device
        from prompt_diffusion.model.load import load_pipeline

        folder = Path(context.artifacts["pipeline"])
        check_folder(folder, (context.model_config or {}).get(DIGEST_KEY))
        self._pipeline = load_pipeline(folder, str(choose_device(AUTO)))
        self._lock = threading.Lock()  # requests come in threads, a pipeline's scheduler has one state
        self._ending = threading.Event()
        _tell_end(self._ending)

    def predict(
        self,
        context: Any,  # noqa: ANN401 - MLflow's own class
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return one row with one image for each row of the request; a mistake in it is answered with status 400."""
        patience = _Patience(self._ending)
        try:
            chosen = Params.model_validate(params or {})
            rows = model_input.to_dict("records")
            self._check_size(len(rows), chosen)
            images = [encode_base64(self._generate(row, chosen, place, patience)) for place, row in enumerate(rows)]
        except ValidationError as error:
            raise MlflowException.invalid_parameter_value(f"params.{say_first_error(error)}") from None
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame({"image": images})

    def _check_size(self, num_rows: int, params: Params) -> None:
        """Refuse what would hold the server for everybody else."""
        if not 1 <= num_rows <= MAX_ROWS:
            raise ValueError(f"a request has 1 to {MAX_ROWS} rows, this one has {num_rows}")
        steps = params.num_inference_steps or self._pipeline.default_num_inference_steps
        if num_rows * steps > MAX_ROW_STEPS:
            raise ValueError(
                f"a request takes up to {MAX_ROW_STEPS} steps over all its rows, this one {num_rows} x {steps}: send fewer "
                "rows at once, or set fewer num_inference_steps"
            )

    def _generate(self, row: dict[Hashable, Any], params: Params, place: int, patience: "_Patience") -> Pixels:
        import torch

        size = self._pipeline.image_size
        images = [read_image(row[name], f"{name} of row {place}") for name in IMAGE_COLUMNS]
        check_pair_shape(images[0], images[1], f"the example pair of row {place}")
        source, target, query = (resize_image(image, size) for image in images)
        chosen = {key: value for key, value in params.model_dump(exclude={"seed"}).items() if value is not None}
        with patience.hold(self._lock):
            (image,) = self._pipeline(
                _read_text(row.get("prompt"), f"prompt of row {place}"),
                (source, target),
                query,
                negative_prompt=_read_text(row.get("negative_prompt"), f"negative_prompt of row {place}"),
                generator=torch.Generator().manual_seed(params.seed),
                output_type="uint8",
                callback_on_step_end=patience.check_step,
                **chosen,
            ).images
        result: Pixels = image
        return result


def refuse_unknown_names() -> None:
    """Have MLflow answer a request of our models with status 400 where it would drop a column or a parameter with a log line.

    MLflow drops them before it calls the model, and offers no setting; so its check is called through ours. Other models that
    are loaded in this process are none of our business: ours are known by the names of their parameters.
    """
    check = mlflow.pyfunc._validate_prediction_input
    if getattr(check, "refuses_unknown_names", False):
        return

    def check_names(data: Any, params: Any, input_schema: Any, params_schema: Any, flavor: Any = None) -> Any:  # noqa: ANN401
        names = [spec.name for spec in params_schema.params] if params_schema is not None else []
        if set(names) == set(Params.model_fields):
            _refuse_strangers("params", params, names)
            _refuse_strangers(
                "columns", data if isinstance(data, pd.DataFrame | dict) else None, input_schema.input_names()
            )
        return check(data, params, input_schema, params_schema, flavor)

    check_names.refuses_unknown_names = True  # type: ignore[attr-defined]
    mlflow.pyfunc._validate_prediction_input = check_names


def _refuse_strangers(kind: str, given: Any, known: list[str]) -> None:  # noqa: ANN401 - a table or a dictionary
    strangers = [str(name) for name in given if name not in known] if given is not None else []
    if strangers:
        raise MlflowException.invalid_parameter_value(
            f"unknown {kind}: {', '.join(strangers)}; a request may have {', '.join(known)}"
        )


class _Patience:
    """How long a request may go on: as long as the server waits for it, and until the server is told to end."""

    def __init__(self, ending: threading.Event) -> None:
        self._ending = ending
        # Outside MLflow's server nobody gives up on a call.
        seconds = MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.get() if _MLFLOW_IS_IN_SERVING_ENVIRONMENT.get() else None
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raise, with status 503, where nobody waits for the answer any more."""
        if self._ending.is_set():
            raise MlflowException("the server is ending: send the request again later", TEMPORARILY_UNAVAILABLE)
        if time.monotonic() > self._deadline:
            raise MlflowException("the request took longer than the server waits for it", TEMPORARILY_UNAVAILABLE)

    def check_step(self, pipeline: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        """Check after a denoising step, as diffusers calls it."""
        self.check()
        return tensors

    @contextmanager
    def hold(self, lock: threading.Lock) -> Iterator[None]:
        """Hold the lock inside the block, waiting for it no longer than is waited for us."""
        while not lock.acquire(timeout=1.0):
            self.check()
        try:
            self.check()
            yield
        finally:
            lock.release()


def _tell_end(ending: threading.Event) -> None:
    """Have a SIGTERM set the event before it reaches the server, which then waits for the requests that it has.

    A process that has no handler of its own ends at once without ours.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGTERM)
    if not callable(before):
        return

    def tell(number: int, frame: FrameType | None) -> None:
        ending.set()
        before(number, frame)

    signal.signal(signal.SIGTERM, tell)


def read_image(text: object, name: str) -> Pixels:
    """Decode a base64 image, with or without a ``data:`` prefix; ValueError, in one sentence, names what it cannot take."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is no text: images are base64 of PNG or JPEG files")
    content = text.rpartition("base64,")[2] if text.startswith("data:") else text
    content = "".join(content.split())  # many programs break its lines
    if len(content) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise ValueError(f"{name} is longer than {MAX_IMAGE_BYTES >> 20} MiB: send a smaller image")
    try:
        return decode_image(base64.b64decode(content, validate=True))
    except binascii.Error as error:
        raise ValueError(f"{name} is not base64 ({error}): send base64 of a PNG or JPEG file") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def encode_base64(image: Pixels) -> str:
    """Return an image as base64 of a PNG file."""
    return base64.b64encode(encode_png(image)).decode()


def _read_text(text: object, name: str) -> str:
    if text is None or text != text:  # pandas says NaN where a row has none
        return ""
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise ValueError(f"{name} is a text of up to {MAX_TEXT} characters")
    return text
