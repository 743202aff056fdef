"""Pre-training of the demo's base, as a task."""

from prefect import task

from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.engine.events import Event
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.stage import identify_pretrain, install_base, run_pretrain
from prompt_diffusion.store.manifest import ManifestRef
from tasks.caching import build_stage_options
from tasks.progress import log_training


@task(name="pretrain", **build_stage_options(identify_pretrain, timeout_seconds=None))
def pretrain(
    config: PretrainConfig, pairs: ManifestRef, maps: dict[str, ManifestRef], store: str, resources: TrainResources
) -> ManifestRef:
    """Train autoencoder, text encoder and UNet from scratch, or go on with them from the last checkpoint."""
    listeners = {phase: log_training(phase) for phase in ("vae", "unet")}

    def report(phase: str, event: Event) -> None:
        listeners[phase](event)

    return run_pretrain(config, pairs, maps, store, resources, on_event=report)


@task(name="install base", persist_result=False)
def install(base: ManifestRef) -> str:
    """Put a base where this checkout looks up `demo-base`."""
    return str(install_base(base))
