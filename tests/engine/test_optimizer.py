import itertools

import pytest
import torch

from prompt_diffusion.engine.config import OptimizerConfig
from prompt_diffusion.engine.optimizer import Muon, build_optimizers, learning_rate_factor, orthogonalise


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 40), (2, 40, 12)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_scale(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * 100
    result = orthogonalise(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    along = torch.diagonal(u.mT @ result @ vh.mT, dim1=-2, dim2=-1)
    assert along.min() > 0.3
    assert along.max() < 1.3
    across = u.mT @ result @ vh.mT - torch.diag_embed(along)
    assert across.abs().max() < 0.02


def test_muon_agrees_with_torchs_own_up_to_its_bfloat16():
    torch.manual_seed(0)
    start, gradients = torch.randn(24, 60), [torch.randn(24, 60) for _ in range(4)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one = Muon([ours], lr=0.02, weight_decay=0.1)
    two = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        two.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved


def test_muon_sees_a_kernel_as_a_matrix():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    flat = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(6, 4, 3, 3)
    flat.grad = kernel.grad.flatten(1).clone()
    Muon([kernel], lr=0.1).step()
    Muon([flat], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(1), flat.detach())


def test_the_rate_climbs_stays_and_falls():
    config = OptimizerConfig(warmup_steps=4, flat_fraction=0.5, final_factor=0.1)
    factors = [learning_rate_factor(step, 20, config) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:10] == [1.0] * 6
    assert factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))


def test_published_rate_is_constant():
    assert {learning_rate_factor(step, 5000, OptimizerConfig()) for step in range(0, 5000, 100)} == {1.0}


def test_every_parameter_has_exactly_one_optimizer():
    parameters = {
        "conv.weight": torch.nn.Parameter(torch.randn(4, 2, 3, 3)),
        "norm.weight": torch.nn.Parameter(torch.randn(4)),
        "token_embedding.weight": torch.nn.Parameter(torch.randn(9, 4)),
    }
    muon, adamw = build_optimizers(parameters, OptimizerConfig(name="muon"))
    owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in (muon, adamw)]
    assert owned[0] == {id(parameters["conv.weight"])}
    assert owned[1] == {id(parameters["norm.weight"]), id(parameters["token_embedding.weight"])}


@pytest.mark.parametrize("shape", [(7,), (5, 3, 3, 3)])
def test_fused_adamw_is_the_plain_one_up_to_rounding(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(20)]
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    (fused,) = build_optimizers({"weight": ours}, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))
    written_out = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1, foreach=False, fused=False)
    for gradient in gradients:
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        fused.step()
        written_out.step()
    assert fused.param_groups[0]["fused"]
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
