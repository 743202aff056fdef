"""The look-up's networks: what describes a picture (E), what is handed over (V), and what draws the draft (the decoder).

Letters: S is the look-up's stride, C the channels of its last level, h, w = H / S, W / S.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation uses

_FIRST_TRUST, _FIRST_CAUTION, _LEAST_ERROR = 2.0, 5.0, 0.01
"""At first a fit of error 0.07 (in [-1, 1]) counts as much as the decoder's own colour, one of 0.01 seventeen times as much."""
_FREQUENCIES = (0.5, 1.0, 2.0, 4.0)
"""Half waves of the positional features along a side of the picture."""


class ResidualBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a skip; a fresh one is the identity."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(norm_groups, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """N, C, h, w in and out."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        residual: Tensor = self.conv2(F.silu(self.norm2(hidden)))
        return x + residual


class SelfAttention(nn.Module):
    """Self-attention over all places of a feature map, beside a skip; a fresh one is the identity."""

    def __init__(self, channels: int, num_heads: int, norm_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.to_out.weight)
        assert self.to_out.bias is not None
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """N, C, h, w in and out."""
        query, key, value = (
            torch.unflatten(part, 1, (self.num_heads, -1)).flatten(3).mT
            for part in self.to_qkv(self.norm(x)).chunk(3, dim=1)
        )
        found = F.scaled_dot_product_attention(query, key, value).mT.reshape(x.shape)
        attended: Tensor = self.to_out(found)
        return x + attended


class PictureEncoder(nn.Module):
    """E: what is where in a picture. Query and example source go through the same one.

    Pixels are gathered in patches; each level but the first halves the size. On the last, a branch of half the size with
    self-attention says what the whole picture is like. Positions enter as waves along the sides, whatever the size.
    """

    def __init__(
        self, channels: Sequence[int], patch_size: int, context_channels: int, num_heads: int, norm_groups: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        widths = (3 * patch_size**2, *channels)
        self.levels = nn.ModuleList(
            nn.Conv2d(width, wider, 3, stride=1 if level == 0 else 2, padding=1)
            for level, (width, wider) in enumerate(zip(widths, channels, strict=False))
        )
        self.block = ResidualBlock(channels[-1], norm_groups)
        self.positions = nn.Conv2d(4 * len(_FREQUENCIES), channels[-1], 1, bias=False)
        self.context = nn.Sequential(
            nn.Conv2d(channels[-1], context_channels, 3, stride=2, padding=1),
            ResidualBlock(context_channels, norm_groups),
            SelfAttention(context_channels, num_heads, norm_groups),
            ResidualBlock(context_channels, norm_groups),
            nn.Conv2d(context_channels, channels[-1], 1),
        )
        self.last_block = ResidualBlock(channels[-1], norm_groups)
        self.norm = nn.GroupNorm(norm_groups, channels[-1])

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the features of N, 3, H, W in [-1, 1]: N, C, h, w, and those of the levels above, the largest first."""
        x, skips = F.pixel_unshuffle(image, self.patch_size), []
        for level in self.levels[:-1]:
            x = F.silu(level(x))
            skips.append(x)
        x = self.block(self.levels[-1](x))
        x = x + self.positions(compute_positional_features(x.shape[2], x.shape[3], like=x))
        x = x + F.interpolate(self.context(x), size=x.shape[2:], mode="nearest")
        features: Tensor = self.norm(self.last_block(x))
        return features, skips


class ValueEncoder(nn.Module):
    """V: what an example shows at each place, target and source together, so that a change of colour can be read off."""

    def __init__(self, channels: Sequence[int], patch_size: int, norm_groups: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        widths = (6 * patch_size**2, *channels)
        self.levels = nn.ModuleList(
            nn.Conv2d(width, wider, 3, stride=1 if level == 0 else 2, padding=1)
            for level, (width, wider) in enumerate(zip(widths, channels, strict=False))
        )
        self.block = ResidualBlock(channels[-1], norm_groups)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the values N, C, h, w of pictures N, 3, H, W in [-1, 1]."""
        x = F.pixel_unshuffle(torch.cat([source, target], dim=1), self.patch_size)
        for level in self.levels[:-1]:
            x = F.silu(level(x))
        values: Tensor = self.block(self.levels[-1](x))
        return values


class Decoder(nn.Module):
    """Draws the draft from the read-out, E's features of the query at every level, and the query recoloured by fits.

    At each pixel it mixes a colour of its own with those of the fitted colour maps: a recolouring that a fit gets exactly
    right need not pass through features. From the start a fit counts the more, the better it explains the pair.
    """

    def __init__(
        self,
        read_out_channels: int,
        channels: Sequence[int],
        widths: Sequence[int],
        patch_size: int,
        num_fits: int,
        norm_groups: int,
    ) -> None:
        """``widths``: channels of the decoder by level, ``channels`` those of E; the largest level first."""
        super().__init__()
        self.patch_size, self.num_fits = patch_size, num_fits
        self.to_deepest = nn.Conv2d(read_out_channels + channels[-1], widths[-1], 1)
        self.block = ResidualBlock(widths[-1], norm_groups)
        self.narrow = nn.ModuleList(nn.Conv2d(wider, width, 1) for width, wider in pairwise(widths))
        fit_channels = 4 * num_fits * patch_size**2  # colour and error of each
        extras = [fit_channels, *(0 for _ in widths[2:])]
        self.merge = nn.ModuleList(
            nn.Conv2d(width + skip + extra, width, 1)
            for width, skip, extra in zip(widths[:-1], channels[:-1], extras, strict=True)
        )
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths[:-1])
        self.to_pixels = nn.Conv2d(widths[0], (3 + 1 + num_fits) * patch_size**2, 3, padding=1)
        self.trust = nn.Parameter(torch.full((num_fits,), _FIRST_TRUST))
        self.caution = nn.Parameter(torch.full((num_fits,), _FIRST_CAUTION))

    def forward(
        self,
        read_out: Tensor,
        features: Tensor,
        skips: Sequence[Tensor],
        fits: Sequence[Tensor],
        errors: Sequence[Tensor],
    ) -> Tensor:
        """Return the draft N, 3, H, W in [-1, 1] (in training it may lie a little outside).

        ``fits``: the query recoloured, N, 3, H, W each; ``errors``: how well each fit explains the pair, N, 1, H, W each.
        """
        x = self.block(self.to_deepest(torch.cat([read_out, features], dim=1)))
        shown = [F.pixel_unshuffle(image, self.patch_size) for image in (*fits, *errors)]
        for level in reversed(range(len(skips))):
            x = F.interpolate(self.narrow[level](x), size=skips[level].shape[2:], mode="nearest")
            x = F.silu(self.merge[level](torch.cat([x, skips[level], *(shown if level == 0 else [])], dim=1)))
            x = F.silu(self.refine[level](x))
        pixels = F.pixel_shuffle(self.to_pixels(x), self.patch_size)
        own, weights = torch.split(pixels, [3, 1 + self.num_fits], dim=1)
        trust, caution = (each[:, None, None] for each in (self.trust, self.caution))
        earned = -trust * (torch.cat(list(errors), dim=1) + _LEAST_ERROR).log() - caution
        weights = torch.cat([weights[:, :1], weights[:, 1:] + earned], dim=1)
        colors, shares = torch.stack([own, *fits], dim=1), weights.softmax(dim=1)
        draft: Tensor = (colors * shares[:, :, None]).sum(dim=1)
        return draft


def compute_positional_features(height: int, width: int, like: Tensor) -> Tensor:
    """Return waves along both sides, 1, P, h, w: a place has the same ones whatever the number of places along a side."""
    y, x = ((torch.arange(size, device=like.device) + 0.5) / size * math.pi for size in (height, width))
    waves = [wave(frequency * side) for frequency in _FREQUENCIES for side in (y, x) for wave in (torch.sin, torch.cos)]
    maps = [
        values[:, None].expand(height, width) if number // 2 % 2 == 0 else values.expand(height, width)
        for number, values in enumerate(waves)
    ]
    return torch.stack(maps)[None].to(like.dtype)
