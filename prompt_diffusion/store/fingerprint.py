"""What a stage's output is a function of, as one digest: stage, version, scientific configuration, inputs."""

import hashlib
import json
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, StringConstraints, field_validator, model_validator

from prompt_diffusion.frozen import FrozenModel
from prompt_diffusion.store.records import ManifestRef
from prompt_diffusion.store.uris import join_uri

IDENTITY_VERSION = 2
"""Bumped when the form of all identities changes, and every fingerprint with it.

2: an input says which stage made it, and roles have one spelling. 1 held a dictionary from role to digest.
"""
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


class StageInput(FrozenModel):
    """One thing that a stage reads: what it is to the stage, who made it, and its content."""

    role: str
    """What it is to the stage: ``pairs``, ``maps/depth``, ``dataset-2/latents/image``."""
    stage: str | None = None
    """The stage that sealed it; None for what no stage made, such as a source's files or a base's weights."""
    fingerprint: str
    """The fingerprint of a sealed input, the digest of any other."""

    @classmethod
    def of(cls, role: str, ref: ManifestRef) -> Self:
        """Return a sealed manifest in a role."""
        return cls(role=role, stage=ref.stage, fingerprint=ref.fingerprint)


class StageIdentity(FrozenModel):
    """All that determines a stage's output, and nothing else: no path, host, time or number of workers."""

    stage: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]
    """The stage's name: the folder of its outputs in the store."""
    version: int = Field(ge=1)
    """Bumped by hand when the stage's code changes what comes out."""
    config: dict[str, Any]
    """The scientific fields of the stage's configuration, as JSON values."""
    inputs: tuple[StageInput, ...]
    """What the stage reads, by role, in the order of the roles' names."""

    @field_validator("config")
    @classmethod
    def _write_as_json(cls, config: dict[str, Any]) -> dict[str, Any]:
        # Tuples become lists now, so that an identity read back from a manifest equals the one that sealed it.
        normalised: dict[str, Any] = json.loads(write_canonical_json(config))
        return normalised

    @field_validator("inputs", mode="before")
    @classmethod
    def _refuse_version_1(cls, inputs: object) -> object:
        if isinstance(inputs, dict):
            raise ValueError(
                "it was sealed by an earlier version of this project, whose fingerprints are others: make it again, or read "
                "it with that version"
            )
        return inputs

    @field_validator("inputs")
    @classmethod
    def _sort(cls, inputs: tuple[StageInput, ...]) -> tuple[StageInput, ...]:
        return tuple(sorted(inputs, key=lambda each: each.role))

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        roles = [each.role for each in self.inputs]
        for role, following in pairwise(roles):
            if role == following:
                raise ValueError(f"stage {self.stage} has two inputs in the role {role!r}")
        return self

    @property
    def fingerprint(self) -> str:
        """The digest that names this output."""
        return compute_fingerprint({"identity": IDENTITY_VERSION, **self.model_dump(mode="json")})

    @property
    def digests(self) -> dict[str, str]:
        """The fingerprint or digest of each input by its role, to be shown."""
        return {each.role: each.fingerprint for each in self.inputs}

    def find_input(self, role: str) -> StageInput | None:
        """Return the input in a role, None where the stage has none in it."""
        return next((each for each in self.inputs if each.role == role), None)

    def uri(self, store_root: str) -> str:
        """Return the folder of this output: ``{store}/{stage}/{fingerprint}``."""
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
