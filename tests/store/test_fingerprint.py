"""A fingerprint is a function of the content alone, and of all of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue, ValidationError

import prompt_diffusion
from prompt_diffusion.store.fingerprint import StageIdentity, compute_digest, compute_fingerprint, write_canonical_json

_IDENTITY: dict[str, Any] = {
    "stage": "ingest",
    "version": 1,
    "config": {"image_size": 64, "source": {"kind": "scenes", "seed": 0}},
    "inputs": [{"role": "source", "stage": None, "fingerprint": "aa"}],
}


def test_fingerprint_of_a_known_content_stays_what_it_was() -> None:
    # Changing this orphans every store: the stages would all run again.
    assert write_canonical_json({"b": [1, 2.5, None, True], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5,null,true]}'
    assert compute_fingerprint({"b": [1, 2.5, None, True], "a": "é"}) == "0b8cc543e984d4d7398f5f603a4b91d3"


def test_digest_is_sha256() -> None:
    assert compute_digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_order_of_keys_does_not_matter_and_order_of_items_does() -> None:
    assert compute_fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == compute_fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    assert compute_fingerprint([1, 2]) != compute_fingerprint([2, 1])


def test_contents_that_differ_have_fingerprints_that_differ() -> None:
    contents: list[JsonValue] = [
        None, True, False, 0, 1, 1.5, "", "0", "1", "true", "null", [], {}, [[]], [None], [0, 1], ["0,1"], [[0], 1],
        {"a": 1}, {"a": "1"}, {"a": None}, {"a": [1]}, {"a": {"b": 1}}, {"a": 1, "b": 1}, {"a,b": 1}, {'a":1,"b': 1},
    ]  # fmt: skip
    assert len({compute_fingerprint(content) for content in contents}) == len(contents)


def test_another_process_computes_the_same_fingerprint() -> None:
    program = (
        "from prompt_diffusion.store.fingerprint import StageIdentity\n"
        f"print(StageIdentity.model_validate({_IDENTITY!r}).fingerprint)"
    )
    checkout = Path(prompt_diffusion.__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=checkout)
    assert answer.stdout.strip() == StageIdentity.model_validate(_IDENTITY).fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_number_that_json_does_not_know_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        compute_fingerprint({"a": [value]})


def test_key_that_json_would_merge_with_another_is_refused() -> None:
    with pytest.raises(ValueError, match="needs str keys, got the int 1"):
        write_canonical_json({"a": [{1: "x"}]})


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "annotate"},
        {"version": 2},
        {"config": {"image_size": 65, "source": {"kind": "scenes", "seed": 0}}},
        {"config": {"image_size": 64, "source": {"kind": "scenes", "seed": 1}}},
        {"config": {"image_size": 64, "source": {"kind": "scenes", "seed": 0}, "more": None}},
        {"inputs": [{"role": "source", "stage": None, "fingerprint": "ab"}]},
        {"inputs": [{"role": "pairs", "stage": None, "fingerprint": "aa"}]},
        {"inputs": [{"role": "source", "stage": "ingest", "fingerprint": "aa"}]},
        {"inputs": []},
    ],
)
def test_every_field_of_an_identity_moves_its_fingerprint(change: dict[str, Any]) -> None:
    assert StageIdentity(**{**_IDENTITY, **change}).fingerprint != StageIdentity(**_IDENTITY).fingerprint


def test_identity_read_back_from_json_is_the_same() -> None:
    identity = StageIdentity(**{**_IDENTITY, "config": {"fractions": (0.9, 0.05, 0.05)}})
    again = StageIdentity.model_validate_json(identity.model_dump_json())
    assert again == identity
    assert again.fingerprint == identity.fingerprint


def test_store_root_places_an_identity_but_does_not_name_it() -> None:
    identity = StageIdentity(**_IDENTITY)
    assert identity.uri("s3://bucket/store/") == f"s3://bucket/store/ingest/{identity.fingerprint}"
    assert identity.uri("/data") == f"/data/ingest/{identity.fingerprint}"


@pytest.mark.parametrize("change", [{"stage": "../ingest"}, {"stage": ""}, {"version": 0}, {"host": "here"}])
def test_identity_that_cannot_be_a_folder_of_the_store_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StageIdentity(**{**_IDENTITY, **change})


def test_the_order_in_which_inputs_are_given_does_not_matter() -> None:
    inputs = [{"role": role, "fingerprint": role} for role in ("pairs", "maps/hed", "base")]
    first, second = (StageIdentity(**{**_IDENTITY, "inputs": each}) for each in (inputs, inputs[::-1]))
    assert first.fingerprint == second.fingerprint


def test_two_inputs_in_one_role_are_refused_by_name() -> None:
    inputs = [{"role": "pairs", "fingerprint": "aa"}, {"role": "pairs", "fingerprint": "ab"}]
    with pytest.raises(ValidationError, match=r"stage ingest has two inputs in the role 'pairs'"):
        StageIdentity(**{**_IDENTITY, "inputs": inputs})


def test_an_identity_of_an_earlier_version_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValidationError, match=r"sealed by an earlier version .* make it again"):
        StageIdentity(**{**_IDENTITY, "inputs": {"source": "aa"}})
