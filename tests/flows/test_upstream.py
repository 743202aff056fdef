"""Flows fail before anything starts, and say why: a stage that is missing, a wrong parameter, a store without access."""

from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from prefect.exceptions import ParameterTypeError

from flows.benchmark import benchmark
from flows.ingest import ingest_pairs
from flows.train import train_controlnet_baselines, train_six_task
from prompt_diffusion.store.storage import list_files

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.mark.parametrize("flow", [train_six_task, train_controlnet_baselines, benchmark])
def test_a_required_stage_that_is_not_sealed_is_named_and_nothing_is_made(flow: Flow[..., Any], tmp_store: str) -> None:
    with pytest.raises(ValueError, match=r"^stage 'ingest' is not sealed: .* is missing, and upstream is 'require'$"):
        flow("smoke", store=tmp_store, upstream="require")
    assert list_files(tmp_store) == []


def test_the_first_stage_that_is_missing_is_the_one_named(tmp_store: str) -> None:
    ingest_pairs("smoke", store=tmp_store)
    with pytest.raises(ValueError, match=r"^stage 'annotate' is not sealed"):
        train_six_task("smoke", store=tmp_store, upstream="require")


def test_a_stage_that_is_missing_is_made_from_the_first_on(tmp_store: str) -> None:
    ref = ingest_pairs("smoke", {"ingest.source.num_groups": 12}, tmp_store)
    assert ref.stage == "ingest"
    assert ref.rows == 12


def test_an_unknown_field_is_refused_by_name_before_anything_is_written(tmp_store: str) -> None:
    with pytest.raises(ValueError, match=r"unknown field 'train.learning_rat'"):
        train_six_task("smoke", {"train.learning_rat": 1}, tmp_store)
    assert list_files(tmp_store) == []


def test_an_unknown_preset_is_refused_by_name() -> None:
    with pytest.raises(ParameterTypeError, match=r"preset"):
        ingest_pairs("huge")  # type: ignore[arg-type]


def test_a_store_that_cannot_be_written_is_refused_with_its_address(tmp_path: Path) -> None:
    file = tmp_path / "a-file"
    file.write_text("no folder")
    with pytest.raises(ValueError, match=r"a-file/store"):
        ingest_pairs("smoke", store=f"{file}/store")
