"""The one cache policy of every stage's task.

Prefect's key is the stage's fingerprint once its output is sealed in the store, else None. The store is the authority
and Prefect's cache a shortcut to it: losing the cache costs a look into the store, and deleting a manifest makes the
stage run again whatever Prefect remembers.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext

from prompt_diffusion.store.fingerprint import compute_digest
from prompt_diffusion.store.manifest import is_sealed
from prompt_diffusion.store.stage import Context, Stage

R = TypeVar("R")


@dataclass
class SealedPolicy(CachePolicy):
    """The policy of a task whose parameters are a ``stage`` and the ``context`` that it runs in."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],  # Prefect's signature
        flow_parameters: dict[str, Any],
        **kwargs: object,
    ) -> str | None:
        """Return the key once the stage is sealed; what is raised here, Prefect logs, and then the task meets it."""
        stage, context = inputs["stage"], inputs["context"]
        assert isinstance(stage, Stage)
        assert isinstance(context, Context)
        return compute_cache_key(stage, context.store)


def compute_cache_key(stage: Stage[R], store: str) -> str | None:
    """Return the cache key of a stage that is sealed in a store, else None."""
    identity = stage.identity
    if not is_sealed(identity.uri(store)):
        return None
    # The cached reference holds the store's address, so two stores must not share one. The key becomes an object's
    # name: no slashes.
    return f"{identity.stage}-{identity.fingerprint}-{compute_digest(store.encode())[:8]}"
