"""Affine colour maps fitted on example pairs by ridge least squares: one for the whole picture, one for each of its places.

A pair enters as its moments (means of colours and of their products) over small squares, so that a fit over any weighting of
places is a weighted mean of moments and the solution of a 3 x 3 system. The weights of places are differentiable.
The local fits are those of guided filtering (He et al., 2010), with a match in place of a window.

Letters: target = slope @ source + offset, colours in [-1, 1]; b is a batch's shape: N, or N, h, w.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation uses

from prompt_diffusion.model.look_up.matching import Match, sum_regardless_of_order

NUM_FITS = 2
"""The whole picture's and the places'."""
GLOBAL_RIDGE, LOCAL_RIDGE = 1e-5, 1e-3
"""Added to the variances of the source's colours: a fit that they do not determine is pulled to no slope, or, of a place, to
the whole picture's slope."""
_LEAST_SHARE = 1e-2
"""How much of the whole picture's moments each place's have beside what it found."""
_WEIGHT, _SOURCE, _TARGET, _SOURCES, _CROSS, _POWER = (1, 3, 3, 9, 9, 1)


@dataclass(frozen=True)
class ColorMap:
    """Affine maps of colours, and how well they explain the pair."""

    slope: Tensor
    """b, 3, 3: row by target channel."""
    offset: Tensor
    """b, 3."""
    error: Tensor
    """Root mean squared error over the places and channels that it was fitted on, b, in [-1, 1]'s unit; 1 where there was no
    pair. No gradient."""


@dataclass(frozen=True)
class Moments:
    """Weight, means of colours and of their products: b each, or b, 3 and b, 3, 3."""

    weight: Tensor
    source: Tensor
    target: Tensor
    sources: Tensor
    """Mean of source @ source^T."""
    cross: Tensor
    """Mean of source @ target^T."""
    power: Tensor
    """Mean of the target's squared length."""


def compute_moments(source: Tensor, target: Tensor, stride: int, has_example: Tensor | None = None) -> Tensor:
    """Return the moments of each square of ``stride`` pixels of a pair N, 3, H, W: N, 26, h, w float32.

    ``has_example``: bool N; moments of a pair that is not shown are zeros, its weight too.
    """
    # affine maps of colours and means of pixels commute: half the size is as exact, and four times faster
    fine = 2 if stride % 2 == 0 else 1
    x, y = (F.avg_pool2d(image.float(), fine) for image in (source, target))
    products = [(x[:, :, None] * other[:, None]).flatten(1, 2) for other in (x, y)]
    parts = [torch.ones_like(x[:, :1]), x, y, *products, y.square().sum(dim=1, keepdim=True)]
    moments = F.avg_pool2d(torch.cat(parts, dim=1), stride // fine)
    return moments if has_example is None else moments * has_example[:, None, None, None]


def fit_globally(moments: Sequence[Tensor]) -> tuple[ColorMap, Tensor]:
    """Fit one map on all pairs (their moments N or 1, 26, h, w); return it, b = N, and the mean moments N, 26."""
    mean = sum_regardless_of_order([each.mean(dim=(2, 3)) for each in moments]) / len(moments)
    no_slope = mean.new_zeros(3, 3)
    return _solve(_unpack(mean), no_slope, GLOBAL_RIDGE), mean


def fit_locally(moments: Sequence[Tensor], match: Match, whole: ColorMap, mean: Tensor) -> ColorMap:
    """Fit a map for each place of the query, b = N, h, w, on the places of the examples where it is found.

    ``whole`` and ``mean``: what ``fit_globally`` returned; a place that is found nowhere gets that map.
    """
    found = match.look_up_with_all_heads(moments) + _LEAST_SHARE * mean[:, :, None, None]
    return _solve(_unpack(found.movedim(1, -1)), whole.slope[:, None, None], LOCAL_RIDGE)


def recolor_globally(image: Tensor, color_map: ColorMap) -> Tensor:
    """Apply maps, b = N or 1, to images N, 3, H, W in [-1, 1], clipped to that range."""
    changed = torch.einsum("nij,njhw->nihw", color_map.slope.expand(len(image), 3, 3), image.float())
    return (changed + color_map.offset[:, :, None, None]).clamp(-1.0, 1.0).to(image.dtype)


def recolor_locally(image: Tensor, color_map: ColorMap) -> Tensor:
    """Apply maps of places, b = N, h, w, interpolated between these, to images N, 3, H, W, clipped to [-1, 1]."""
    size = (image.shape[2], image.shape[3])
    maps = torch.cat([color_map.slope.flatten(3), color_map.offset], dim=3).movedim(3, 1)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    slope, offset = torch.split(maps, [9, 3], dim=1)
    changed = (torch.unflatten(slope, 1, (3, 3)) * image.float()[:, None]).sum(dim=2) + offset
    return changed.clamp(-1.0, 1.0).to(image.dtype)


def _unpack(moments: Tensor) -> Moments:
    """Split b, 26, and divide by the weight; all zeros where that is zero."""
    weight, *parts = torch.split(moments, [_WEIGHT, _SOURCE, _TARGET, _SOURCES, _CROSS, _POWER], dim=-1)
    source, target, sources, cross, power = (part / weight.clamp_min(1e-6) for part in parts)
    sources, cross = (torch.unflatten(part, -1, (3, 3)) for part in (sources, cross))
    return Moments(weight[..., 0], source, target, sources, cross, power[..., 0])


def _solve(moments: Moments, prior: Tensor, ridge: float) -> ColorMap:
    """Return argmin over slope S and offset o of E|target - S source - o|^2 + ridge |S - prior|^2."""
    covariance = moments.sources - _outer(moments.source, moments.source)
    cross = moments.cross - _outer(moments.source, moments.target)
    penalty = ridge * torch.eye(3, device=cross.device)
    solution = torch.linalg.solve(covariance + penalty, cross + ridge * prior.mT)  # slope transposed
    slope = solution.mT
    offset = moments.target - (slope @ moments.source[..., None])[..., 0]
    with torch.no_grad():
        spread = moments.power - moments.target.square().sum(dim=-1)
        explained = 2 * (solution * cross).sum(dim=(-2, -1)) - (solution * (covariance @ solution)).sum(dim=(-2, -1))
        error = ((spread - explained).clamp_min(0.0) / 3).sqrt()
        error = torch.where(moments.weight > 0, error, torch.ones_like(error))
    return ColorMap(slope, offset, error)


def _outer(one: Tensor, other: Tensor) -> Tensor:
    return one[..., :, None] * other[..., None, :]
