"""What a stage's output is a function of, as one digest: stage, version, scientific configuration, inputs."""

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field, JsonValue, StringConstraints, field_validator

from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.storage import join_uri

_FINGERPRINT_DIGITS = 32


def write_canonical_json(content: object) -> str:
    """Return the one JSON text of a value: keys sorted, no spaces, ASCII; ValueError for NaN and for keys not str."""
    _check_keys(content)
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def compute_fingerprint(content: JsonValue) -> str:
    """Return the first 32 hex digits of the SHA-256 of the canonical JSON."""
    return compute_digest(write_canonical_json(content).encode())[:_FINGERPRINT_DIGITS]


def compute_digest(data: bytes) -> str:
    """Return the SHA-256 of the bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


class StageIdentity(FrozenModel):
    """All that determines a stage's output, and nothing else: no path, host, time or number of workers."""

    stage: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]
    """The stage's name: the folder of its outputs in the store."""
    version: int = Field(ge=1)
    """Bumped by hand when the stage's code changes what comes out."""
    config: dict[str, Any]
    """The scientific fields of the stage's configuration, as JSON values."""
    inputs: dict[str, str]
    """Fingerprint or digest of each input, by its role."""

    @field_validator("config")
    @classmethod
    def _write_as_json(cls, config: dict[str, Any]) -> dict[str, Any]:
        # Tuples become lists now, so that an identity read back from a manifest equals the one that sealed it.
        normalised: dict[str, Any] = json.loads(write_canonical_json(config))
        return normalised

    @property
    def fingerprint(self) -> str:
        """The digest that names this output."""
        return compute_fingerprint(self.model_dump(mode="json"))

    def uri(self, store_root: str) -> str:
        """Return the folder of this output: `{store}/{stage}/{fingerprint}`."""
        return join_uri(store_root, self.stage, self.fingerprint)


def _check_keys(content: object) -> None:
    """Raise ValueError for a key that is not a string: JSON would turn 1 and "1" into the same key."""
    if isinstance(content, dict):
        for key, value in content.items():
            if not isinstance(key, str):
                raise ValueError(f"a fingerprint needs str keys, got the {type(key).__name__} {key!r}")
            _check_keys(value)
    elif isinstance(content, list | tuple):
        for value in content:
            _check_keys(value)
