"""The one cache policy: a key where the store has the output, and only there."""

import pytest
from prefect import task
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.context import TaskRunContext
from prefect.states import State

from prompt_diffusion.store.fingerprint import StageIdentity
from prompt_diffusion.store.manifest import DamagedDataError, ManifestRef, seal_manifest, write_file
from prompt_diffusion.store.storage import delete_folder
from tasks.caching import SealedPolicy, build_stage_options, identify_stage, is_transient

POLICY = SealedPolicy(identify=lambda config, pairs: identify(config, pairs))
PAIRS = ManifestRef(uri="/anywhere", stage="ingest", fingerprint="0" * 32, rows=1)


def identify(config: int, pairs: ManifestRef) -> StageIdentity:
    return StageIdentity(stage="toy", version=1, config={"value": config}, inputs={"pairs": pairs.fingerprint})


def seal(config: int, store: str) -> ManifestRef:
    identity = identify(config, PAIRS)
    return seal_manifest(identity, store, [write_file(identity, store, "a.txt", b"a")], counts={})


def compute_key(store: str, config: int = 1, pairs: ManifestRef = PAIRS, threads: int = 1) -> str | None:
    context = TaskRunContext.model_construct()
    return POLICY.compute_key(context, {"config": config, "pairs": pairs, "store": store, "threads": threads}, {})


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


def test_a_tasks_stage_is_known_without_running_it() -> None:
    @task(**build_stage_options(identify, timeout_seconds=None))
    def toy(config: int, pairs: ManifestRef, store: str) -> ManifestRef:
        raise AssertionError("it must not run")

    assert identify_stage(toy, {"config": 3, "pairs": PAIRS, "store": "/store"}) == identify(3, PAIRS)


def test_a_task_that_makes_no_stage_has_no_identity() -> None:
    @task
    def plain(store: str) -> None: ...

    with pytest.raises(TypeError, match="makes no stage"):
        identify_stage(plain, {"store": "/store"})


@pytest.mark.parametrize(
    ("error", "can_help"),
    [
        (ConnectionError("reset"), True),
        (RuntimeError("killed"), True),
        (ValueError("typo"), False),
        (DamagedDataError("x"), False),
    ],
)
def test_a_retry_follows_what_can_pass_and_not_a_users_mistake(error: Exception, can_help: bool) -> None:
    @task
    def toy() -> None: ...

    state: State[None] = State(type=StateType.FAILED, data=error)
    run = TaskRun(task_key="toy", dynamic_key="0")
    assert is_transient(toy, run, state) is can_help
