"""One request for an image: its settings, running it, and a PNG that carries them.

The command line and the studio both go through here, so that each reproduces the other's results, bit for bit.
"""

from prompt_diffusion.generation.model import ModelIdentity, OpenModel, identify_model, open_model
from prompt_diffusion.generation.record import SETTINGS_KEY, GenerationRecord, encode_result, read_record
from prompt_diffusion.generation.request import GenerationRequest, build_request
from prompt_diffusion.generation.run import Generation, OnStep, run_request

__all__ = [
    "SETTINGS_KEY",
    "Generation",
    "GenerationRecord",
    "GenerationRequest",
    "ModelIdentity",
    "OnStep",
    "OpenModel",
    "build_request",
    "encode_result",
    "identify_model",
    "open_model",
    "read_record",
    "run_request",
]
