"""Where in the examples each place of a query is found: cosine attention with a null key for what they do not show.

K example pairs are K times the keys. Whatever is summed over them is summed regardless of their order, to the last bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation uses

_FIRST_SCALE = 8.0
_NOWHERE = -1e4
"""Score of the keys of an example that is not shown: its weight is exactly zero."""


@dataclass(frozen=True)
class Match:
    """Where each of a query's n = h * w places is found; all weights of a place and head sum to 1."""

    weights: list[Tensor]
    """For each example pair, the weights of its m places: N, heads, n, m, float32."""
    null_weights: Tensor
    """The weight of the null key, N, heads, n, float32."""
    entropy: Tensor
    """How scattered the weights are, N, 1, h, w, from 0 (one place) to 1 (all places and the null key alike); no gradient."""
    size: tuple[int, int]
    """h, w."""

    @property
    def null_share(self) -> Tensor:
        """The null key's weight, mean over heads: N, 1, h, w."""
        return torch.unflatten(self.null_weights.mean(dim=1), 1, self.size)[:, None]

    def look_up(self, values: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum over the examples' places (not the null key): N, D, h, w.

        ``values``: for each example pair, N or 1, D, h, w; each head looks up its own part of D.
        """
        heads = self.null_weights.shape[1]
        found = [
            weights.to(value.dtype) @ split_heads(value, heads)
            for weights, value in zip(self.weights, values, strict=True)
        ]
        return torch.unflatten(sum_regardless_of_order(found).mT.flatten(1, 2), 2, self.size)

    def look_up_with_all_heads(self, values: Sequence[Tensor]) -> Tensor:
        """Return the sum weighted by the mean over heads: N, D, h, w; ``values`` as in ``look_up``."""
        found = [
            value.flatten(2).to(weights.dtype) @ weights.mean(dim=1).mT
            for weights, value in zip(self.weights, values, strict=True)
        ]
        return torch.unflatten(sum_regardless_of_order(found), 2, self.size)


class Matching(nn.Module):
    """Scores are a cosine times a learned scale, plus a bias for where a key lies relative to the query's place.

    Cosine attention and a bias that is a small network of continuous coordinates are Swin Transformer V2's (arXiv 2111.09883,
    section 3); coordinates are relative to the picture's sides, so that a larger picture is read as a small one. For the same
    reason a picture's keys together weigh as much however many there are: the scores have log m subtracted.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_key = nn.Conv2d(channels, channels, 1)
        self.to_value = nn.Conv2d(channels, channels, 1)
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(_FIRST_SCALE)))
        self.null_key = nn.Parameter(torch.randn(channels) * 0.3)
        self.null_bias = nn.Parameter(torch.zeros(num_heads))
        self.null_value = nn.Parameter(torch.zeros(channels))
        self.null_source = nn.Parameter(torch.zeros(channels))
        self.position_bias = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, num_heads))
        last = self.position_bias[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, query: Tensor, sources: Sequence[Tensor], has_example: Tensor | None = None) -> Match:
        """Match E's features of the query, N, C, h, w, with those of each example source, N or 1, C, h, w.

        ``has_example``: bool N; where it is False, only the null key is found. Computed in float32 under any autocast.
        """
        size = (query.shape[2], query.shape[3])
        with torch.autocast(query.device.type, enabled=False):
            bias = self._compute_position_bias(size)
            scaled = self._to_unit_heads(query) * self.log_scale.float().exp()[:, None, None]
            scores = []
            for source in sources:
                key = self._to_unit_heads(source)
                score = scaled @ key.mT + bias - math.log(key.shape[2])
                if has_example is not None:
                    score = score.masked_fill(~has_example[:, None, None, None], _NOWHERE)
                scores.append(score)
            null_key = F.normalize(split_heads(self.null_key.float()[None, :, None, None], self.num_heads), dim=-1)
            null_score = (scaled @ null_key.mT).squeeze(-1) + self.null_bias.float()[:, None]
            return _normalise(scores, null_score, size)

    def read_values(self, match: Match, values: Sequence[Tensor]) -> Tensor:
        """Return V's features, as the match finds them, N, C, h, w; the null value where nothing is found."""
        found = match.look_up([self.to_value(value) for value in values])
        return found + self._weigh_null(match, self.null_value, found)

    def read_sources(self, match: Match, sources: Sequence[Tensor]) -> Tensor:
        """Return E's features of the examples' sources, as the match finds them, N, C, h, w."""
        found = match.look_up(sources)
        return found + self._weigh_null(match, self.null_source, found)

    def _weigh_null(self, match: Match, vector: Tensor, like: Tensor) -> Tensor:
        of_heads = vector.view(self.num_heads, -1, 1) * match.null_weights[:, :, None].to(vector.dtype)
        return torch.unflatten(of_heads.flatten(1, 2), 2, match.size).to(like.dtype)

    def _to_unit_heads(self, features: Tensor) -> Tensor:
        projected = F.conv2d(features.float(), self.to_key.weight.float(), _as_float(self.to_key.bias))
        return F.normalize(split_heads(projected, self.num_heads), dim=-1)

    def _compute_position_bias(self, size: tuple[int, int]) -> Tensor:
        """Return heads, n, m for a query and an example of h, w places: a function of the offset in shares of the sides."""
        height, width = size
        device, dtype = self.log_scale.device, self.log_scale.dtype
        y, x = (torch.arange(1 - side, side, device=device, dtype=dtype) / side for side in size)
        offsets = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
        bias: Tensor = self.position_bias(offsets).float()  # 2h - 1, 2w - 1, heads
        rows, columns = (torch.arange(side, device=device) for side in size)
        dy = rows[:, None] - rows[None, :] + height - 1
        dx = columns[:, None] - columns[None, :] + width - 1
        chosen = bias[dy[:, None, :, None], dx[None, :, None, :]]  # h, w, h, w, heads
        return chosen.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


def _normalise(scores: Sequence[Tensor], null_score: Tensor, size: tuple[int, int]) -> Match:
    with torch.no_grad():
        highest = null_score
        for score in scores:
            highest = torch.maximum(highest, score.amax(dim=-1))
    weights = [(score - highest[..., None]).exp() for score in scores]
    null = (null_score - highest).exp()
    total = sum_regardless_of_order([weight.sum(dim=-1) for weight in weights]) + null
    with torch.no_grad():
        surprises = [
            (weight * (score - highest[..., None])).sum(dim=-1) for weight, score in zip(weights, scores, strict=True)
        ]
        surprise = sum_regardless_of_order(surprises) + null * (null_score - highest)
        num_keys = 1 + sum(score.shape[-1] for score in scores)
        entropy = (total.log() - surprise / total).mean(dim=1) / math.log(num_keys)
    return Match(
        weights=[weight / total[..., None] for weight in weights],
        null_weights=null / total,
        entropy=torch.unflatten(entropy, 1, size)[:, None],
        size=size,
    )


def split_heads(features: Tensor, num_heads: int) -> Tensor:
    """Turn N, C, h, w into N, heads, h * w, C / heads."""
    return torch.unflatten(features.flatten(2), 1, (num_heads, -1)).mT


def sum_regardless_of_order(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of K tensors: the same to the last bit in any order, and a single one unchanged.

    Sums of floating-point numbers depend on their order, so the K values of each place are sorted before they are summed.
    """
    return parts[0] if len(parts) == 1 else sort_values(parts).sum(dim=0).to(parts[0].dtype)


def sort_values(parts: Sequence[Tensor]) -> Tensor:
    """Return K tensors (N or 1, ...) stacked, float32 K, N, ..., the K values of each place in ascending order."""
    count = max(len(each) for each in parts)
    return torch.stack([each.expand(count, *each.shape[1:]) for each in parts]).float().sort(dim=0).values


def _as_float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()
