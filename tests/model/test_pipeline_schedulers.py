"""Any of diffusers' schedulers: one seed one image, whatever its batch; nothing is left of the call before."""

import diffusers
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers

# one of the list needs a package that is not among ours: diffusers has a stand-in there, which is no scheduler
LISTED = [each.name for each in KarrasDiffusionSchedulers]
# LCM's and TCD's are not in diffusers' own list; stochastic variants of listed ones are options
# written for an older NumPy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAMES = [name for name in LISTED if issubclass(getattr(diffusers, name), diffusers.SchedulerMixin)] + [
    "LCMScheduler",
    "TCDScheduler",
    "DDIMParallelScheduler",
]
STOCHASTIC = {
    "DDIMScheduler": ({}, {"eta": 0.7}),
    "DPMSolverMultistepScheduler": ({"algorithm_type": "sde-dpmsolver++"}, {}),
    "EulerAncestralDiscreteScheduler": ({}, {}),
    "LCMScheduler": ({}, {}),
    "DDPMScheduler": ({}, {}),
}


@pytest.fixture
def sample(pipeline, draw_images, seeded):
    """Return what samples with a scheduler: rows of two queries, each with its own seed."""
    own = pipeline.scheduler
    source, target, query = draw_images(2)

    def call(name, rows, *, seeds=(1, 2), config=None, **options):
        pipeline.scheduler = getattr(diffusers, name).from_config({**own.config, **(config or {})})
        again = []
        for _ in range(2):
            generators = [seeded(*seeds)[row] for row in rows]
            again.append(
                pipeline(
                    "a red cube",
                    (source[rows], target[rows]),
                    query[rows],
                    generator=generators,
                    num_inference_steps=4,
                    output_type="latent",
                    **options,
                ).images
            )
        assert torch.equal(*again), f"{name} remembers the call before"
        return again[0]

    yield call
    pipeline.scheduler = own


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_samples_each_image_alone_as_in_a_batch(sample, name):
    together = sample(name, [0, 1])
    assert bool(torch.isfinite(together).all())
    alone = torch.cat([sample(name, [0]), sample(name, [1])])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3 * float(together.abs().max()))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_noise_of_every_step_is_the_images_own(sample, name):
    config, options = STOCHASTIC[name]
    first = sample(name, [0, 1], config=config, **options)
    # the other image's seed moves the other image alone
    second = sample(name, [0, 1], seeds=(1, 5), config=config, **options)
    scale = float(first.abs().max())
    torch.testing.assert_close(second[0], first[0], rtol=0, atol=1e-3 * scale)
    assert float((second[1] - first[1]).abs().max()) > 0.01 * scale
    alone = sample(name, [1], config=config, **options)
    torch.testing.assert_close(alone[0], first[1], rtol=0, atol=1e-3 * scale)


def test_eta_brings_noise_into_ddim(sample):
    assert not torch.equal(sample("DDIMScheduler", [0]), sample("DDIMScheduler", [0], eta=0.5))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "KarrasVeScheduler", "RePaintScheduler"])
def test_a_scheduler_of_another_kind_of_model_is_named(pipeline, draw_images, name):
    own, images = pipeline.scheduler, draw_images(1)
    pipeline.scheduler = getattr(diffusers, name)()
    try:
        with pytest.raises(ValueError, match=f"{name} cannot sample from a model like Stable Diffusion"):
            pipeline("", None, images[2])
    finally:
        pipeline.scheduler = own
