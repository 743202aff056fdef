"""The one cache policy: a key where the store has the output, and only there."""

from dataclasses import dataclass

import httpx
import pytest
from prefect import task
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.context import TaskRunContext
from prefect.states import State
from ray.exceptions import RayTaskError, WorkerCrashedError

from prompt_diffusion.engine.stopping import Stopped
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import DamagedDataError, ManifestRef
from prompt_diffusion.store.retries import StoreError
from prompt_diffusion.store.sealing import seal_manifest, write_file
from prompt_diffusion.store.stage import Context, Stage, obtain
from prompt_diffusion.store.storage import delete_folder
from prompt_diffusion.training.launch import TimeLimitError, TrainingStoppedError
from tasks.caching import SealedPolicy
from tasks.retries import is_transient

PAIRS = ManifestRef(uri="/anywhere", stage="ingest", fingerprint="0" * 32, rows=1)


@dataclass(frozen=True)
class Toy(Stage[int]):
    config: int
    pairs: ManifestRef = PAIRS

    @property
    def title(self) -> str:
        return "toy"

    def identify(self) -> StageIdentity:
        inputs = (StageInput.of("pairs", self.pairs),)
        return StageIdentity(stage="toy", version=1, config={"value": self.config}, inputs=inputs)

    def run(self, context: Context[int]) -> ManifestRef:
        file = write_file(self.identity, context.store, "a.txt", b"a")
        return seal_manifest(self.identity, context.store, [file], counts={})


def seal(config: int, store: str) -> ManifestRef:
    return obtain(Toy(config), Context(store, 1))


def compute_key(store: str, config: int = 1, pairs: ManifestRef = PAIRS, threads: int = 1) -> str | None:
    parameters = {"stage": Toy(config, pairs), "context": Context(store, threads)}
    return SealedPolicy().compute_key(TaskRunContext.model_construct(), parameters, {})


def test_a_stage_that_is_not_sealed_has_no_key(tmp_store: str) -> None:
    assert compute_key(tmp_store) is None


def test_a_sealed_stage_has_its_fingerprint_as_key_and_the_key_is_one_file_name(tmp_store: str) -> None:
    ref = seal(1, tmp_store)
    key = compute_key(tmp_store)
    assert key is not None
    assert ref.fingerprint in key
    assert "/" not in key


def test_a_deleted_manifest_takes_the_key_away(tmp_store: str) -> None:
    ref = seal(1, tmp_store)
    delete_folder(ref.uri)
    assert compute_key(tmp_store) is None


def test_what_identity_does_not_know_does_not_move_the_key(tmp_store: str) -> None:
    seal(1, tmp_store)
    elsewhere = PAIRS.model_copy(update={"uri": "s3://another/place", "rows": 9})
    assert compute_key(tmp_store, threads=7, pairs=elsewhere) == compute_key(tmp_store)


def test_another_configuration_has_another_key(tmp_store: str) -> None:
    seal(1, tmp_store)
    assert compute_key(tmp_store, config=2) is None
    seal(2, tmp_store)
    assert compute_key(tmp_store, config=2) != compute_key(tmp_store)


def test_two_stores_have_two_keys_because_the_cached_reference_names_its_store(tmp_store: str) -> None:
    seal(1, tmp_store)
    seal(1, f"{tmp_store}-2")
    assert compute_key(tmp_store) != compute_key(f"{tmp_store}-2")


@pytest.mark.parametrize(
    ("error", "can_help"),
    [
        (ConnectionError("reset"), True),
        (TimeoutError("no answer"), True),
        (httpx.ConnectError("refused"), True),
        (TrainingStoppedError("killed"), True),
        (WorkerCrashedError(), True),
        (RayTaskError("shard", "a traceback", TypeError("a fault of the program")).as_instanceof_cause(), False),
        (RayTaskError("shard", "a traceback", TimeoutError("no answer")).as_instanceof_cause(), True),
        (TimeLimitError("the time is over"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (TypeError("a fault of the program"), False),
        (KeyError("a fault of the program"), False),
        (AssertionError(), False),
        (StoreError("cannot read s3://bucket/x: timeout"), True),
        (PermissionError("cannot write"), False),
        (FileNotFoundError("there is no file"), False),
        (ImportError("install gcsfs"), False),
        (ValueError("typo"), False),
        (Stopped("stopped at step 4 of 6"), False),
        (DamagedDataError("x"), False),
    ],
)
def test_a_retry_follows_what_can_pass_and_not_a_users_mistake(error: Exception, can_help: bool) -> None:
    @task
    def toy() -> None: ...

    state: State[None] = State(type=StateType.FAILED, data=error)
    run = TaskRun(task_key="toy", dynamic_key="0")
    assert is_transient(toy, run, state) is can_help
