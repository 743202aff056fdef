"""Optimizers and learning-rate schedules, as data of a recipe: AdamW as published, Muon for short budgets."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from prompt_diffusion.engine.config import OptimizerConfig
from prompt_diffusion.engine.distributed import SINGLE_PROCESS, World

# Quintic Newton-Schulz coefficients and five iterations: Jordan et al., "Muon" (2024), the values torch.optim.Muon has.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrices (approximately): B, rows, columns in, the same shape out.

    Newton-Schulz on the smaller side, in float32 throughout: torch.optim.Muon rounds to bfloat16, which a CPU without such
    instructions emulates, several times slower. For long matrices the iteration runs on the small Gram matrix alone, of which
    every factor is a polynomial, and meets the matrix once, at the end.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.flatten(-2).norm(dim=-1).clamp_min(1e-7)[:, None, None]
    if x.shape[-1] < 2 * x.shape[-2]:
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        near_square: Tensor = x.mT if is_tall else x
        return near_square
    gram, product = x @ x.mT, None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    long: Tensor = product @ x
    return long.mT if is_tall else long


class Muon(Optimizer):
    """Momentum whose update is orthogonalised, for weights of two or more dimensions (kernels are flattened).

    Matrices of one shape are orthogonalised in one batched product, each process taking its share of them. Nesterov momentum
    0.95, decoupled weight decay, the step scaled by sqrt(max(1, rows / columns)), as Jordan et al. do.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        world: World = SINGLE_PROCESS,
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.world = world

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None, "closures are not used here"
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
            for (rows, columns), update in self._compute_updates(by_shape, group["momentum"]).items():
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, direction in zip(by_shape[rows, columns], update, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction.view_as(parameter), alpha=-rate)

    def _compute_updates(
        self, by_shape: dict[tuple[int, int], list[Tensor]], momentum: float
    ) -> dict[tuple[int, int], Tensor]:
        """Return the orthogonalised updates by shape; those of other processes arrive in one all-reduce."""
        rank, size = self.world.rank, self.world.size
        updates = {}
        for shape, parameters in by_shape.items():
            directions = torch.stack([self._momentum(parameter, momentum) for parameter in parameters])
            if size == 1:
                updates[shape] = orthogonalise(directions)
            else:
                updates[shape] = torch.zeros_like(directions)
                if len(parameters) > rank:
                    updates[shape][rank::size] = orthogonalise(directions[rank::size])
        if size > 1:
            flat = torch.cat([update.flatten() for update in updates.values()])
            self.world.all_reduce(flat)
            parts = torch.split(flat, [update.numel() for update in updates.values()])
            updates = {shape: part.view_as(updates[shape]) for shape, part in zip(updates, parts, strict=True)}
        return updates

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the parameter's momentum and return Nesterov's look-ahead as a matrix: rows, columns."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum).flatten(1)


def build_optimizers(
    parameters: Mapping[str, Tensor], config: OptimizerConfig, world: World = SINGLE_PROCESS
) -> list[Optimizer]:
    """Return the optimizers of a recipe, each with its ``base_lr`` in every group.

    ``adamw``: one AdamW over everything. ``muon``: Muon for weights of two or more dimensions, AdamW for the rest
    (biases, normalisations, embeddings).
    """
    matrices, rest = split_parameters(parameters, config)
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=config.muon_learning_rate, weight_decay=decay, world=world))
    if rest:
        optimizers.append(AdamW(rest, lr=config.learning_rate, betas=betas, weight_decay=decay, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def split_parameters(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a recipe gives to Muon and what it gives to AdamW."""
    matrices = {name: p for name, p in parameters.items() if p.ndim >= 2 and not is_embedding(name)}
    if config.name == "adamw":
        matrices = {}
    return list(matrices.values()), [p for name, p in parameters.items() if name not in matrices]


def estimate_state_bytes(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> int:
    """Return the bytes of the optimizers' state: one tensor per weight for Muon, two for AdamW."""
    matrices, rest = split_parameters(parameters, config)
    return sum(p.nbytes for p in matrices) + 2 * sum(p.nbytes for p in rest)


def is_embedding(name: str) -> bool:
    """Whether a parameter is a lookup table, whose rows are updated one by one and so not as a matrix."""
    return "embedding.weight" in name


def learning_rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Return what the base learning rate is multiplied by at a step (0-based): warm-up, flat, linear to the final factor."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_start = int(num_steps * config.flat_fraction)
    if config.flat_fraction >= 1.0 or step < decay_start:
        return 1.0
    progress = (step + 1 - decay_start) / (num_steps - decay_start)
    return 1.0 - (1.0 - config.final_factor) * progress


def set_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every group's rate to its base rate times the factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
