"""Pre-training of the demo's base, as tasks."""

from prefect import task

from prompt_diffusion.store.manifest import ManifestRef
from prompt_diffusion.training.config import TrainResources
from prompt_diffusion.training.pretrain_config import PretrainConfig
from prompt_diffusion.training.pretrain_latents import identify_latents, run_latents
from prompt_diffusion.training.pretrain_stage import (
    identify_autoencoder,
    identify_pretrain,
    install_base,
    run_autoencoder,
    run_pretrain,
)
from tasks.caching import build_stage_options
from tasks.progress import log_progress, log_training


@task(name="pretrain autoencoder", **build_stage_options(identify_autoencoder, timeout_seconds=None))
def pretrain_autoencoder(
    config: PretrainConfig, pairs: ManifestRef, maps: dict[str, ManifestRef], store: str, resources: TrainResources
) -> ManifestRef:
    """Train the autoencoder from scratch, or go on with it from the last checkpoint."""
    return run_autoencoder(config, pairs, maps, store, resources, on_event=log_training("autoencoder"))


@task(name="pretrain latents", **build_stage_options(identify_latents, timeout_seconds=None))
def pretrain_latents(
    config: PretrainConfig,
    autoencoder: ManifestRef,
    pairs: ManifestRef,
    maps: dict[str, ManifestRef],
    store: str,
    resources: TrainResources,
) -> ManifestRef:
    """Make the latents of all that the UNet is shown."""
    return run_latents(
        config, autoencoder, pairs, maps, store, resources, on_progress=log_progress("latents", unit="pairs")
    )


@task(name="pretrain", **build_stage_options(identify_pretrain, timeout_seconds=None))
def pretrain(
    config: PretrainConfig,
    autoencoder: ManifestRef,
    latents: ManifestRef,
    pairs: ManifestRef,
    maps: dict[str, ManifestRef],
    store: str,
    resources: TrainResources,
) -> ManifestRef:
    """Train text encoder and UNet from scratch, or go on with them from the last checkpoint."""
    return run_pretrain(
        config, autoencoder, latents, pairs, maps, store, resources, on_event=log_training("text to image")
    )


@task(name="install base", persist_result=False)
def install(base: ManifestRef) -> str:
    """Put a base where this checkout looks up `demo-base`."""
    return str(install_base(base))
