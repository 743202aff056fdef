"""The look-up: what an example pair shows, found again in a query, as features for a ControlNet and as a draft.

Letters: the paper's image1 and image2 are the example source and target, image3 is the query. E describes the query and the
example sources, V what the examples hand over; S is the stride, C the channels of E and V, h, w = H / S, W / S.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation uses

from prompt_diffusion.data.transforms import Pixels, from_model_range
from prompt_diffusion.model.look_up.color_fit import (
    NUM_FITS,
    compute_moments,
    fit_globally,
    fit_locally,
    recolor_globally,
    recolor_locally,
)
from prompt_diffusion.model.look_up.matching import Match, Matching
from prompt_diffusion.model.look_up.networks import Decoder, PictureEncoder, ValueEncoder

_MEASURES = 2
"""Entropy and the null key's weight."""
_FIT_CHANNELS = 2 * 4
"""Of each fit, the mean colour that it gives a place of the query, and its error."""


@dataclass(frozen=True)
class Reading:
    """What the examples say about a query."""

    read_out: Tensor
    """N, R, h, w: values, E of the examples as found minus E of the query, entropy, null share, and the fits' colours."""
    fits: list[Tensor]
    """The query recoloured by the global and the local fit: N, 3, H, W each, in [-1, 1]."""
    errors: list[Tensor]
    """How badly each fit explains the pair, N, 1, H, W each, in the same unit."""


@dataclass(frozen=True)
class Draft:
    """What the look-up alone answers: one forward pass, no diffusion."""

    images: Pixels
    """uint8 N, H, W, 3."""
    null_share: Tensor
    """Which share of each place of the query was found in no example, N, h, w, from 0 to 1."""


class LookUp(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Cross-attention from the query to example pairs, with a null key, and a light decoder.

    Images are N, 3, H, W in [-1, 1], sides multiples of ``stride``; any size and aspect, any number of pairs, whose order
    plays no part.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        channels: tuple[int, ...] = (24, 48, 64),
        patch_size: int = 2,
        context_channels: int = 96,
        decoder_channels: tuple[int, ...] = (24, 48, 80),
        num_heads: int = 4,
        norm_groups: int = 8,
        has_decoder: bool = True,
    ) -> None:
        """Build a fresh one; ``channels`` and ``decoder_channels`` are by level, the largest first."""
        super().__init__()
        if len(decoder_channels) != len(channels) or len(channels) < 2:
            raise ValueError(
                f"channels {tuple(channels)} and decoder_channels {tuple(decoder_channels)} must be of the same two or more "
                "levels"
            )
        self.encoder = PictureEncoder(channels, patch_size, context_channels, num_heads, norm_groups)
        self.value_encoder = ValueEncoder(channels, patch_size, norm_groups)
        self.matching = Matching(channels[-1], num_heads)
        self.decoder = (
            Decoder(self.read_out_channels, channels, decoder_channels, patch_size, NUM_FITS, norm_groups)
            if has_decoder
            else None
        )

    @property
    def stride(self) -> int:
        """Pixels along a side of one place."""
        return int(self.config["patch_size"] * 2 ** (len(self.config["channels"]) - 1))

    @property
    def feature_channels(self) -> int:
        """Channels C of E and V."""
        return int(self.config["channels"][-1])

    @property
    def read_out_channels(self) -> int:
        """Channels R of the read-out."""
        return 2 * self.feature_channels + _MEASURES + _FIT_CHANNELS

    def match(
        self, query_features: Tensor, source_features: Sequence[Tensor], has_example: Tensor | None = None
    ) -> Match:
        """Find each place of the query in the examples; features as E gives them."""
        matched: Match = self.matching(query_features, source_features, has_example)
        return matched

    def read(
        self,
        match: Match,
        query: Tensor,
        query_features: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        source_features: Sequence[Tensor],
        has_example: Tensor | None = None,
    ) -> Reading:
        """Read what the pairs (source, target; N or 1, 3, H, W each) show where the match found the query."""
        found = self.matching.read_values(match, [self.value_encoder(source, target) for source, target in pairs])
        difference = self.matching.read_sources(match, source_features) - query_features
        measures = torch.cat([match.entropy, match.null_share], dim=1).to(found.dtype)
        with torch.autocast(query.device.type, enabled=False):
            moments = [compute_moments(source, target, self.stride, has_example) for source, target in pairs]
            whole, mean = fit_globally(moments)
            local = fit_locally(moments, match, whole, mean)
            fits = [recolor_globally(query, whole), recolor_locally(query, local)]
            size, count = (query.shape[2], query.shape[3]), len(query)
            errors = [
                whole.error[:, None, None, None].expand(count, 1, *size).to(query.dtype),
                F.interpolate(local.error[:, None], size=size, mode="nearest").to(query.dtype),
            ]
            coarse = F.avg_pool2d(torch.cat([*fits, *errors], dim=1), self.stride).to(found.dtype)
        return Reading(torch.cat([found, difference, measures, coarse], dim=1), fits, errors)

    def forward(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        query: Tensor,
        has_example: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Match]:
        """Return read-out and E of the query, N, R + C, h, w; the draft N, 3, H, W if there is a decoder; and the match.

        ``pairs``: at least one example source and target, N or 1, 3, H, W each, all of the query's size; each goes through
        the networks in a pass of its own. ``has_example``: bool N; False where a pair is not to be seen.
        """
        self._check_sides(query)
        query = query.expand(max(len(query), *(len(source) for source, _ in pairs)), -1, -1, -1)
        query_features, skips = self.encoder(query)
        source_features = [self.encoder(source)[0] for source, _ in pairs]
        match = self.match(query_features, source_features, has_example)
        reading = self.read(match, query, query_features, pairs, source_features, has_example)
        features = torch.cat([reading.read_out, query_features], dim=1)
        return features, self.decode(reading, query_features, skips), match

    def decode(self, reading: Reading, query_features: Tensor, skips: Sequence[Tensor]) -> Tensor | None:
        """Return the draft N, 3, H, W, None without a decoder."""
        if self.decoder is None:
            return None
        draft: Tensor = self.decoder(reading.read_out, query_features, skips, reading.fits, reading.errors)
        return draft

    @torch.no_grad()
    def draft(self, pairs: Sequence[tuple[Tensor, Tensor]], query: Tensor) -> Draft:
        """Answer by the look-up alone; ``pairs`` and ``query`` as in ``forward``. ValueError where there is no decoder."""
        _, draft, match = self(pairs, query)
        if draft is None:
            raise ValueError("this look-up has no decoder: it gives features, and no draft")
        return Draft(from_model_range(draft), match.null_share[:, 0].float().cpu())

    def _check_sides(self, query: Tensor) -> None:
        if query.shape[2] % self.stride or query.shape[3] % self.stride:
            raise ValueError(
                f"the look-up reads images whose sides are multiples of {self.stride}, not {query.shape[3]} x {query.shape[2]}"
            )
