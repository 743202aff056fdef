"""MLflow's registered models, and loading them back; what a training logs to MLflow is in ``tracking``.

Nothing in an artifact is ever executed: a model is safetensors and JSON, checked against digests and read by our own loader.
"""

from prompt_diffusion.registry.download import fetch, load
from prompt_diffusion.registry.facts import ModelFacts
from prompt_diffusion.registry.measurements import record_evaluation, record_metrics
from prompt_diffusion.registry.registration import describe_registration, register_folder, register_model
from prompt_diffusion.registry.versions import (
    CHALLENGER,
    CHAMPION,
    ModelVersionSummary,
    RegisteredModel,
    list_versions,
    set_alias,
)
from prompt_diffusion.tracking.client import connect
from prompt_diffusion.tracking.tracker import RunTracker

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "ModelFacts",
    "ModelVersionSummary",
    "RegisteredModel",
    "RunTracker",
    "connect",
    "describe_registration",
    "fetch",
    "list_versions",
    "load",
    "record_evaluation",
    "record_metrics",
    "register_folder",
    "register_model",
    "set_alias",
]
