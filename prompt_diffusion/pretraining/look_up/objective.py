"""What a look-up minimises: its draft's error, and how well E's features tell classes, depth, edges and colours."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation uses

from prompt_diffusion.model.look_up.look_up import LookUp
from prompt_diffusion.pretraining.look_up.config import LookUpConfig
from prompt_diffusion.pretraining.look_up.samples import SceneBatch, SceneSampler


class AuxiliaryHead(nn.Module):
    """Reads E's features for what the dataset knows of a scene anyway; it is thrown away after the training."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.read = nn.Conv2d(channels, num_classes + 2 + 3, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the classes, N, K, h, w, depth and edges, N, 2, h, w, and colours, N, 3, h, w."""
        logits, maps, colors = torch.split(self.read(features).float(), [self.num_classes, 2, 3], dim=1)
        return logits, maps, colors


class LookUpObjective:
    """L1 of the draft, objects weighted, and the auxiliary losses; at first these alone, on E alone."""

    def __init__(self, config: LookUpConfig, look_up: LookUp, head: AuxiliaryHead, sampler: SceneSampler) -> None:
        self.config, self.look_up, self.head, self.sampler = config, look_up, head, sampler
        self.labels = sampler.labels
        self._auxiliary_until = config.num_auxiliary_steps * config.batch_size

    def prepare(self, indices: range) -> SceneBatch:
        """Return a micro-batch; may be called from any thread."""
        return self.sampler.make_batch(indices, has_targets=indices.start >= self._auxiliary_until)

    def compute_losses(self, batch: SceneBatch) -> tuple[Tensor, list[int]]:
        """Return the loss of each pair of scenes, both directions together, and its kind of target."""
        weights = torch.where(batch.classes >= self.config.num_background_classes, self.config.object_weight, 1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            features, skips = self.look_up.encoder(batch.images)
            losses = torch.zeros(len(features))
            if self.config.auxiliary_weight:
                losses = losses + self.config.auxiliary_weight * self._compute_auxiliary_losses(
                    batch, features, weights
                )
            if batch.targets:
                drafts = self._draw_drafts(batch, features, skips)
                errors = [
                    _weighted_mean((draft.float() - target).abs().mean(dim=1), weights)
                    for draft, target in zip(drafts, batch.targets, strict=True)
                ]
                losses = losses + torch.stack(errors).mean(dim=0)
        return torch.unflatten(losses, 0, (2, -1)).mean(dim=0), batch.labels

    def _draw_drafts(self, batch: SceneBatch, features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        """Return the draft for each member of the family, 2 n, 3, H, W: every scene asks about its partner's pair."""
        images, partners = batch.images, _swap(batch.images)
        sources = [_swap(features)]
        match, drafts = self.look_up.match(features, sources), []
        for target in batch.targets:
            reading = self.look_up.read(match, images, features, [(partners, _swap(target))], sources)
            draft = self.look_up.decode(reading, features, skips)
            assert draft is not None, "a configuration without a decoder is refused"
            drafts.append(draft)
        return drafts

    def _compute_auxiliary_losses(self, batch: SceneBatch, features: Tensor, weights: Tensor) -> Tensor:
        """Return cross-entropy (with the shares of the classes in each place) and L1 of maps and colours, 2 n."""
        stride, num_classes = self.look_up.stride, len(self.config.class_colors)
        logits, maps, colors = self.head(features)
        one_hot = F.one_hot(batch.classes, num_classes).movedim(3, 1).float()
        shares = F.avg_pool2d(one_hot, stride)
        entropy = -(shares * logits.log_softmax(dim=1)).sum(dim=1)
        mapped = (maps - F.avg_pool2d(batch.maps, stride)).abs().mean(dim=(1, 2, 3))
        colored = (colors - F.avg_pool2d(batch.images, stride)).abs().mean(dim=(1, 2, 3))
        told: Tensor = _weighted_mean(entropy, F.avg_pool2d(weights[:, None], stride)[:, 0]) + mapped + colored
        return told


def _swap(values: Tensor) -> Tensor:
    """Give each scene of 2 n its partner's."""
    return values.roll(len(values) // 2, dims=0)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return N from N, H, W."""
    return (values * weights).mean(dim=(1, 2)) / weights.mean(dim=(1, 2))
