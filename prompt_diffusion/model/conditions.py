"""Query and example pairs of a call, checked against each other and brought to one size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prompt_diffusion.model.images import Images, Picture, fit_picture, read_images, show_size, stack_pictures

ExamplePair = tuple[Images, Images]
"""(source, target): one image each, or one each a query."""
ExamplePairs = ExamplePair | Sequence[ExamplePair] | None
"""One pair, a list of K pairs, or none."""


@dataclass(frozen=True)
class Conditions:
    """What the stems read, in [-1, 1]."""

    queries: Tensor
    """N, 3, H, W."""
    example_pairs: list[Tensor] | None
    """K tensors of N (or 1), 6, H, W: source, then target."""

    @property
    def num_example_pairs(self) -> int:
        """Example pairs of the batch: 1 where they are shared."""
        return max((len(pair) for pair in self.example_pairs or []), default=1)


def read_conditions(query: Images, example_pair: ExamplePairs, height: int, width: int, stride: int) -> Conditions:
    """Return queries and pairs of ``height`` x ``width`` pixels.

    ValueError, in one sentence: a pair whose sides differ in size, a size that is no multiple of ``stride``.
    """
    example_pairs = None if example_pair is None else [_read_pair(pair) for pair in list_example_pairs(example_pair)]
    if example_pairs == []:
        raise ValueError("there is no example pair in the list: give at least one, or None")
    queries = read_images(query, "query")
    if not queries:
        raise ValueError("query: there is no image in the list")
    _check_size(height, width, stride)
    fitted = None if example_pairs is None else [_fit_pair(pair, height, width) for pair in example_pairs]
    return Conditions(stack_pictures([fit_picture(each, height, width) for each in queries]), fitted)


def count_batch(num_queries: int, given: Mapping[str, int]) -> int:
    """Return the size of a batch: of queries or, where one serves all, of the longest list; ValueError names what is not."""
    count = num_queries if num_queries > 1 else max(given.values())
    for name, number in given.items():
        if number not in (1, count):
            whose = "queries" if count == num_queries else "images"
            raise ValueError(f"{number} {name} were given for {count} {whose}: give one, or one each")
    return count


def _check_size(height: int, width: int, stride: int) -> None:
    if height < stride or width < stride or height % stride or width % stride:
        near = [max(stride, round(side / stride) * stride) for side in (height, width)]
        raise ValueError(
            f"height and width must be multiples of {stride}, got {height} x {width}: give height={near[0]}, width={near[1]}"
        )


def list_example_pairs(example_pair: ExamplePair | Sequence[ExamplePair]) -> list[ExamplePair]:
    """Return every pair alone; ValueError where one is no (source, target)."""
    example_pairs = [example_pair] if isinstance(example_pair, tuple) else example_pair
    if not isinstance(example_pairs, list) or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 for pair in example_pairs
    ):
        raise ValueError("example_pair is (source, target), a list of such pairs, or None")
    return [(pair[0], pair[1]) for pair in example_pairs]


def _read_pair(pair: ExamplePair) -> tuple[list[Picture], list[Picture]]:
    """Return the sources and their targets."""
    sources, targets = read_images(pair[0], "example source"), read_images(pair[1], "example target")
    if len(sources) != len(targets) or not sources:
        raise ValueError(f"example pairs have as many sources as targets, got {len(sources)} and {len(targets)}")
    for source, target in zip(sources, targets, strict=True):
        if source.shape != target.shape:
            raise ValueError(
                f"example source and target must have one size, got {show_size(source)} and {show_size(target)} "
                "(height x width): resize one of them"
            )
    return sources, targets


def _fit_pair(pair: tuple[list[Picture], list[Picture]], height: int, width: int) -> Tensor:
    """Return N, 6, H, W."""
    sides = (stack_pictures([fit_picture(each, height, width) for each in side]) for side in pair)
    return torch.cat(list(sides), dim=1)
