"""What every stage's task has in common; above all the one cache policy.

Prefect's key is the stage's fingerprint once its output is sealed in the store, else None. The store is the authority
and Prefect's cache a shortcut to it: losing the cache costs a look into the store, and deleting a manifest makes the
stage run again whatever Prefect remembers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypedDict

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext

from prompt_diffusion.store.fingerprint import StageIdentity, compute_digest
from prompt_diffusion.store.manifest import is_sealed
from tasks.plain_errors import USER_MISTAKES

DAY_SECONDS = 24 * 3600


@dataclass
class SealedPolicy(CachePolicy):
    """The policy of a task that makes one stage, in the store that its parameter `store` names."""

    identify: Callable[..., StageIdentity] | None = None
    """The stage's identify function (None only because the parent's fields have defaults)."""

    def identify_stage(self, parameters: Mapping[str, Any]) -> StageIdentity:
        """Return the identity of the stage under a task's parameters: those alone that the identity may depend on."""
        assert self.identify is not None, "a SealedPolicy is made with an identify function"
        names = signature(self.identify).parameters
        return self.identify(**{name: value for name, value in parameters.items() if name in names})

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: object
    ) -> str | None:
        """Return the key once the stage is sealed; what is raised here, Prefect logs, and then the task meets it."""
        store = inputs["store"]
        identity = self.identify_stage(inputs)
        if not is_sealed(identity.uri(store)):
            return None
        # The cached reference holds the store's address, so two stores must not share one. The key becomes an
        # object's name: no slashes.
        return f"{identity.stage}-{identity.fingerprint}-{compute_digest(store.encode())[:8]}"


RetryCondition = Callable[[Task[..., Any], TaskRun, State[Any]], bool]


class StageOptions(TypedDict):
    """The options of `prefect.task` that every stage sets."""

    cache_policy: SealedPolicy
    persist_result: bool
    result_serializer: str
    retries: int
    retry_delay_seconds: float
    retry_condition_fn: RetryCondition
    timeout_seconds: float | None


def is_transient(stage: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Say whether a retry can help: not with a user's mistake or damaged data, which stay so."""
    return not isinstance(state.result(raise_on_failure=False), USER_MISTAKES)


def build_stage_options(
    identify: Callable[..., StageIdentity], *, timeout_seconds: float | None, can_retry: RetryCondition = is_transient
) -> StageOptions:
    """Return the options of a task whose stage is the one that `identify` names."""
    return StageOptions(
        cache_policy=SealedPolicy(identify=identify),
        persist_result=True,
        result_serializer="json",  # Prefect's default is pickle
        retries=3,
        retry_delay_seconds=30,
        retry_condition_fn=can_retry,
        timeout_seconds=timeout_seconds,
    )


def identify_stage(stage: Task[..., Any], parameters: Mapping[str, Any]) -> StageIdentity:
    """Return the identity of what a stage's task would make of these parameters, without running it."""
    policy = stage.cache_policy
    if not isinstance(policy, SealedPolicy):
        raise TypeError(f"task {stage.name!r} makes no stage: its cache policy is {policy!r}")
    return policy.identify_stage(parameters)
