"""A registered model behind MLflow's scoring server: base64 images in, base64 images out.

Loaded by ``mlflow.pyfunc`` alone (see ``model_code.py``). The weights are safetensors beside it; the code is this package's.
"""

import base64
import binascii
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema
from pydantic import Field, ValidationError

from prompt_diffusion.data.transforms import Pixels, check_pair_shape, decode_image, encode_png, resize_image
from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.registry.cache import check_folder

if TYPE_CHECKING:
    from prompt_diffusion.model.pipeline import PromptDiffusionPipeline

IMAGE_COLUMNS = ("example_source", "example_target", "query")
MAX_IMAGE_BYTES = 16 << 20
MAX_ROWS = 16
MAX_TEXT = 2000
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
        from prompt_diffusion.device import AUTO, choose_device
        from prompt_diffusion.model.load import load_pipeline

        folder = Path(context.artifacts["pipeline"])
        check_folder(folder, (context.model_config or {}).get(DIGEST_KEY))
        self._pipeline = load_pipeline(folder, str(choose_device(AUTO)))
        self._lock = threading.Lock()  # requests come in threads, a pipeline's scheduler has one state

    def predict(
        self,
        context: Any,  # noqa: ANN401 - MLflow's own class
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return one row with one image for each row of the request; a mistake in it is answered with status 400."""
        try:
            chosen = Params.model_validate(params or {})
            rows = model_input.to_dict("records")
            if not 1 <= len(rows) <= MAX_ROWS:
                raise ValueError(f"a request has 1 to {MAX_ROWS} rows, this one has {len(rows)}")
            images = [encode_base64(self._generate(row, chosen, place)) for place, row in enumerate(rows)]
        except ValidationError as error:
            first = error.errors()[0]
            message = f"params.{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}"
            raise MlflowException.invalid_parameter_value(message) from None
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame({"image": images})

    def _generate(self, row: dict[Hashable, Any], params: Params, place: int) -> Pixels:
        import torch

        size = self._pipeline.image_size
        images = [read_image(row[name], f"{name} of row {place}") for name in IMAGE_COLUMNS]
        check_pair_shape(images[0], images[1], f"the example pair of row {place}")
        source, target, query = (resize_image(image, size) for image in images)
        chosen = {key: value for key, value in params.model_dump(exclude={"seed"}).items() if value is not None}
        with self._lock:
            (image,) = self._pipeline(
                _read_text(row.get("prompt"), f"prompt of row {place}"),
                (source, target),
                query,
                negative_prompt=_read_text(row.get("negative_prompt"), f"negative_prompt of row {place}"),
                generator=torch.Generator().manual_seed(params.seed),
                output_type="uint8",
                **chosen,
            ).images
        result: Pixels = image
        return result


def read_image(text: object, name: str) -> Pixels:
    """Decode a base64 image, with or without a ``data:`` prefix; ValueError, in one sentence, names what it cannot take."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is no text: images are base64 of PNG or JPEG files")
    content = text.rpartition("base64,")[2] if text.startswith("data:") else text
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
