"""Pre-training: the small base model that is to the demo what Stable Diffusion v1.5 is to the paper."""

from prefect import flow

from flows.run import Upstream, start_run
from flows.stages import obtain, obtain_dataset, obtain_pairs
from prompt_diffusion.engine.config import TrainResources
from prompt_diffusion.pretraining.config import PretrainConfig
from prompt_diffusion.pretraining.latents import PretrainLatents
from prompt_diffusion.pretraining.stage import Pretrain, PretrainAutoencoder
from prompt_diffusion.store.manifest import ManifestRef
from tasks.publish import install

# World 1000: the demo's own scenes are of world 0, so that its base has seen none of them.
WORLD = 1000
CONDITIONS = ("depth", "hed", "seg", "normal")


@flow(name="pretrain", flow_run_name="pretrain on {num_scenes} scenes")
def pretrain_demo_base(
    num_scenes: int = 10_000,
    config: PretrainConfig = PretrainConfig(),  # noqa: B008 - frozen
    store: str | None = None,
    upstream: Upstream = "make",
    install_it: bool = False,
) -> ManifestRef:
    """Train the demo's base from scratch, on scenes: autoencoder, tokenizer, text encoder, text-to-image UNet.

    Args:
        num_scenes: How many scene pairs to make; a twentieth of them is held out, to evaluate the base.
        config: Architecture and recipe.
        store: Folder or s3:// address that keeps every stage; empty means PROMPT_DIFFUSION_STORE, else ``outputs/store``.
        upstream: What to do about scenes and maps that are not sealed yet: make them, or fail and name the first.
        install_it: Also put the result where this checkout looks up ``demo-base``, instead of the one that is shipped.
    """
    overrides = {
        "ingest.source.num_groups": num_scenes,
        "ingest.source.seed": WORLD,
        "ingest.split_fractions": [0.95, 0.05, 0.0],
        "ingest.image_size": config.image_size,
        "annotate": [{"condition": condition} for condition in CONDITIONS],
    }
    run = start_run("demo", overrides, store, upstream, needs_models=False)
    dataset = obtain_dataset(run, obtain_pairs(run))
    making, resources = run.making(), TrainResources(checkpoint_every_seconds=120.0)
    autoencoder = obtain(making, PretrainAutoencoder(config, dataset), resources)
    latents = obtain(making, PretrainLatents(config, autoencoder, dataset), resources)
    base = obtain(making, Pretrain(config, autoencoder, latents, dataset), resources)
    if install_it:
        install(base)
    return base
