"""Claim: our Muon steps faster on a CPU than torch.optim.Muon, which iterates in bfloat16 and takes one matrix at a time.

Both step on the same matrices, those of the demo's ControlNet and decoder (kernels flattened, as torch's demands), in turn in
one process. The last line is one JSON object.
"""

import argparse
from collections.abc import Callable

import torch
from _measuring import add_out_option, compare, describe_device, find_versions, finish, take_turns

from prompt_diffusion.engine.optimizer import Muon
from prompt_diffusion.model.base import load_base
from prompt_diffusion.presets import build_preset
from prompt_diffusion.training.train import build_controlnet, select_parameters


def read_shapes() -> list[tuple[int, int]]:
    """Return rows and columns of every weight of two or more dimensions that the demo trains."""
    config = build_preset("demo").train
    base = load_base(config.base)
    parameters = select_parameters(config, base, build_controlnet(config, base))
    return [(p.shape[0], p[0].numel()) for p in parameters.values() if p.ndim >= 2]


def build(kind: Callable[..., torch.optim.Optimizer], shapes: list[tuple[int, int]]) -> torch.optim.Optimizer:
    """Return an optimizer over matrices of those shapes, with gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return kind(parameters, lr=0.01, weight_decay=0.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    add_out_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = read_shapes()
    optimizers = {"ours": build(Muon, shapes), "peer": build(torch.optim.Muon, shapes)}
    seconds = take_turns(arguments.rounds, {name: optimizer.step for name, optimizer in optimizers.items()})
    finish(
        {
            "name": "muon",
            **compare(seconds),
            "unit": "seconds a step",
            "device": describe_device(),
            "versions": find_versions("torch"),
            "matrices": len(shapes),
            "parameters": sum(rows * columns for rows, columns in shapes),
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
