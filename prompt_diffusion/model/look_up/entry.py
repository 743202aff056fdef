"""Where a look-up enters the ControlNet: its features join those of the stems through zero convolutions."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation uses

from prompt_diffusion.model.look_up.look_up import Draft, LookUp


class LookUpEntry(nn.Module):
    """A look-up, and the convolutions that take its read-out and its draft to condition features; they start at zero."""

    def __init__(self, network: LookUp, features: int, stem_stride: int) -> None:
        """Take the look-up, and the stems' channels and stride; ValueError where they shrink an image otherwise."""
        super().__init__()
        if network.stride != stem_stride:
            raise ValueError(f"the look-up shrinks an image {network.stride} times, the stems {stem_stride} times")
        self.network = network
        self.from_read_out = _build_zero_convolution(network.read_out_channels + network.feature_channels, features)
        self.from_draft = None if network.decoder is None else _build_zero_convolution(3 * network.stride**2, features)

    def forward(
        self, example_pairs: Sequence[Tensor] | None, query: Tensor, has_example: Tensor | None = None
    ) -> Tensor:
        """Return condition features N, F, h, w; arguments as those of the ControlNet's ``compute_condition_features``."""
        pairs, has_example = _split_pairs(example_pairs, query, has_example)
        read_out, draft, _ = self.network(pairs, query, has_example)
        features: Tensor = self.from_read_out(read_out)
        if self.from_draft is not None and draft is not None:
            features = features + self.from_draft(F.pixel_unshuffle(draft, self.network.stride))
        return features

    def draft(self, example_pairs: Sequence[Tensor], query: Tensor) -> Draft:
        """Answer by the look-up alone."""
        return self.network.draft(_split_pairs(example_pairs, query, None)[0], query)


def _split_pairs(
    example_pairs: Sequence[Tensor] | None, query: Tensor, has_example: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Return (source, target) of each pair N or 1, 6, H, W; no pair at all is a grey one that is nowhere to be seen."""
    if example_pairs is None:
        grey = query.new_zeros(1, *query.shape[1:])
        return [(grey, grey)], query.new_zeros(len(query)).bool()
    return [(pair[:, :3], pair[:, 3:]) for pair in example_pairs], has_example


def _build_zero_convolution(channels: int, features: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, features, 1)
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
