"""What ``docs/operations.md`` tells an engineer to do, done: deploy this checkout, start a worker, run a deployment."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

PrefectCommand = Callable[..., subprocess.CompletedProcess[str]]

DEPLOYMENTS = {
    "ingest/instruct-pix2pix",
    "annotate/six-task",
    "train/six-task",
    "train/controlnet-baselines",
    "train/custom",
    "evaluate/nightly",
    "benchmark/paper-table",
    "reproduce/demo",
    "reproduce/paper",
    "pretrain/demo-base",
}

# What nobody can guess: a user's own pairs.
REQUIRED = {"train/custom": ["folder", "condition"]}

pytestmark = pytest.mark.usefixtures("deployments")


@pytest.mark.usefixtures("in_process")
def test_deploying_again_changes_nothing(prefect_command: PrefectCommand) -> None:
    again = prefect_command("--no-prompt", "deploy", "--all")
    assert again.returncode == 0, again.stderr
    with get_client(sync_client=True) as client:
        flow_names = {flow.id: flow.name for flow in client.read_flows()}
        found = [f"{flow_names[deployment.flow_id]}/{deployment.name}" for deployment in client.read_deployments()]
    assert sorted(found) == sorted(DEPLOYMENTS)


def test_six_task_runs_on_a_worker_and_leaves_a_sealed_and_registered_model(
    prefect_command: PrefectCommand, prefect_environment: dict[str, str], worker_log: Path
) -> None:
    result = prefect_command("deployment", "run", "train/six-task", "--param", "preset=smoke", "--watch")
    assert result.returncode == 0, result.stdout + worker_log.read_text()[-4000:]
    store = Path(prefect_environment["PROMPT_DIFFUSION_STORE"])
    assert len(list(store.glob("train/*/manifest.parquet"))) == 1
    assert Path(prefect_environment["PREFECT_HOME"], "mlflow.db").is_file()


def test_a_preset_that_does_not_exist_is_refused_by_name_before_a_run_is_made(prefect_command: PrefectCommand) -> None:
    result = prefect_command("deployment", "run", "train/six-task", "--param", "preset=huge")
    assert result.returncode != 0
    assert "'preset'" in result.stdout
    assert "'huge'" in result.stdout


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_the_parameters_form_says_what_every_field_means(name: str) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(name)
    form = deployment.parameter_openapi_schema
    assert deployment.description
    assert form["properties"]
    assert [field for field, schema in form["properties"].items() if not schema.get("description")] == []
    assert form.get("required", []) == REQUIRED.get(name, [])
