"""The Prompt Diffusion ControlNet: diffusers' ControlNet with an example-pair stem beside the query stem.

Letters: the paper's image1 and image2 are the example source and example target, image3 is the query.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from prompt_diffusion.building import builds_networks
from prompt_diffusion.model.look_up.entry import LookUpEntry
from prompt_diffusion.model.look_up.look_up import Draft, LookUp
from prompt_diffusion.model.look_up.matching import sort_values

PUBLISHED_STEM_CHANNELS = (16, 32, 96, 256)
EXAMPLE_PAIR_CHANNELS = 6
QUERY_CHANNELS = 3
# what decides whether a trunk's residuals fit a UNet
_ARCHITECTURE = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")


class PromptDiffusionControlNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A copy of the UNet's encoder, steered by an example pair and a query.

    Two stems turn images in [-1, 1] into features at the latents' size: one reads the example pair (6 channels: source, then
    target), one the query (3 channels). Their sum enters once, after the first convolution. All output convolutions, and the
    last one of each stem, start at zero. With ``example_pair=False`` there is no example stem: the task-specific ControlNet
    that the paper calls CN(FT).

    With ``look_up_config``, the pair enters by a second way, too: what attention finds in it for each place of the query
    (``look_up/``) is added to the stems' features, through zero convolutions, so that a fresh one changes nothing.

    Source: arXiv 2305.01115, section 3.2 and figure 3.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        trunk_config: dict[str, Any],
        stem_channels: tuple[int, ...] = PUBLISHED_STEM_CHANNELS,
        example_pair: bool = True,
        unit_query: bool = False,
        look_up_config: dict[str, Any] | None = None,
    ) -> None:
        """Build a fresh one; ``unit_query``: the query stem was trained on images in [0, 1], as public ControlNets are.

        ``look_up_config``: that of a LookUp; None for the published model, where the pair enters by its stem alone.

        Folding the change of range into the stem's first convolution would not do: its zero padding means black in one range
        and mid-grey in the other. So the query is brought to [0, 1] before the stem, which is exact at the borders too.
        """
        super().__init__()
        self.trunk = ControlNetModel(**trunk_config)
        # The stems are computed once per image, outside the denoising loop, so what enters here are features.
        self.trunk.controlnet_cond_embedding = nn.Identity()
        features = self.trunk.config["block_out_channels"][0]
        self.query_stem = ControlNetConditioningEmbedding(features, QUERY_CHANNELS, stem_channels)
        self.example_stem = (
            ControlNetConditioningEmbedding(features, EXAMPLE_PAIR_CHANNELS, stem_channels) if example_pair else None
        )
        self.look_up = None
        if look_up_config is not None:
            if not example_pair:
                raise ValueError(
                    "a look-up reads example pairs, and this model takes a query alone (example_pair=False)"
                )
            self.look_up = LookUpEntry(LookUp(**look_up_config), features, stem_stride=2 ** (len(stem_channels) - 1))

    def register_to_config(self, **kwargs: Any) -> None:  # noqa: ANN401 - diffusers' own
        """Keep the configuration; one without a look-up is written as it was before there were any."""
        if kwargs.get("look_up_config", ...) is None:
            del kwargs["look_up_config"]
        super().register_to_config(**kwargs)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        stem_channels: tuple[int, ...] = PUBLISHED_STEM_CHANNELS,
        example_pair: bool = True,
        look_up: LookUp | None = None,
    ) -> Self:
        """Build one whose trunk holds the UNet's encoder and middle block, its zero convolutions and stems initialised anew.

        With a look-up, it holds a copy of that one, silent at first.
        """
        trunk = ControlNetModel.from_unet(unet)
        model: Self = cls(
            trunk_config=_list_fields(trunk),
            stem_channels=tuple(stem_channels),
            example_pair=example_pair,
            look_up_config=None if look_up is None else _list_fields(look_up),
        )
        model.trunk.load_state_dict(_without(trunk.state_dict(), "controlnet_cond_embedding."))
        if look_up is not None:
            assert model.look_up is not None
            model.look_up.network.load_state_dict(look_up.state_dict())
        return model

    @classmethod
    def from_controlnet(cls, source: ControlNetModel, example_pair: bool = True) -> Self:
        """Build one that does to the query what a diffusers ControlNet does, its example stem fresh and silent."""
        config = _list_fields(source)
        # for the stem to handle: the trunk would reverse the channels of features
        is_bgr = config["controlnet_conditioning_channel_order"] == "bgr"
        model: Self = cls(
            trunk_config=config | {"controlnet_conditioning_channel_order": "rgb"},
            stem_channels=tuple(config["conditioning_embedding_out_channels"]),
            example_pair=example_pair,
            unit_query=True,
        )
        stem = source.controlnet_cond_embedding.state_dict()
        if is_bgr:
            stem["conv_in.weight"] = stem["conv_in.weight"].flip(1)
        model.query_stem.load_state_dict(stem)
        model.trunk.load_state_dict(_without(source.state_dict(), "controlnet_cond_embedding."))
        return model

    @property
    def uses_example_pair(self) -> bool:
        """Whether the model reads an example pair (False for a task-specific baseline)."""
        return self.example_stem is not None

    def set_attention_slice(self, slice_size: str | int | list[int] | None) -> None:
        """Slice the trunk's attention, as ``enable_attention_slicing`` of a pipeline asks of each of its networks."""
        self.trunk.set_attention_slice(slice_size)

    @apply_forward_hook  # type: ignore[untyped-decorator]  # an offloaded model comes to the device for this, too
    def compute_condition_features(
        self, example_pair: Tensor | Sequence[Tensor] | None, query: Tensor, has_example: Tensor | None = None
    ) -> Tensor:
        """Return the sum of the stems' features and, if there is one, the look-up's: N, C, h, w at the latents' size.

        ``example_pair`` is N, 6, H, W (source, then target) and ``query`` N, 3, H, W, both in [-1, 1]; a batch of 1 is
        shared. ``None`` stands for a mid-grey pair (zeros), what the model sees in training where the pair is dropped; the
        look-up then finds its null key alone. ``has_example``, bool N, drops the pair where it is False. Several example pairs
        are averaged in the example stem's feature space, whatever their order; a list of one is that one alone.
        """
        features: Tensor = self.query_stem((query + 1.0) / 2.0 if self.config["unit_query"] else query)
        if self.example_stem is None:
            if example_pair is not None:
                raise ValueError("this model has no example stem: it takes a query alone (example_pair=None)")
            return features.contiguous()
        given = [example_pair] if isinstance(example_pair, Tensor) else example_pair
        if given is not None and has_example is not None:
            given = [pair * has_example[:, None, None, None] for pair in given]
        shown = (
            given if given is not None else [query.new_zeros(query.shape[0], EXAMPLE_PAIR_CHANNELS, *query.shape[2:])]
        )
        combined: Tensor = features + average_features([self.example_stem(pair) for pair in shown])
        if self.look_up is not None:
            combined = combined + self.look_up(given, query, has_example)
        return combined.contiguous()  # the trunk keeps its own layout, whatever the stems' is

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def draft(self, example_pair: Tensor | Sequence[Tensor], query: Tensor) -> Draft:
        """Return what the look-up alone answers, in one pass and without diffusion, and which places it found in no example.

        Arguments as in ``compute_condition_features``; ValueError for a model without a look-up.
        """
        if self.look_up is None:
            raise ValueError("this model has no look-up: its pair enters by the stem alone, so it gives no draft")
        return self.look_up.draft([example_pair] if isinstance(example_pair, Tensor) else example_pair, query)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        condition_features: Tensor,
        conditioning_scale: float = 1.0,
    ) -> tuple[list[Tensor], Tensor]:
        """Return the residuals for the UNet's skip connections (one per skip) and for its middle block.

        ``sample``: noisy latents N, 4, h, w. ``encoder_hidden_states``: text N, L, C. ``condition_features``: what
        ``compute_condition_features`` gave.
        """
        down, middle = self.trunk(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond=condition_features,
            conditioning_scale=conditioning_scale,
            return_dict=False,
        )
        return down, middle


def average_features(features: Sequence[Tensor]) -> Tensor:
    """Return the mean of K tensors (N or 1, C, h, w): the same to the last bit in any order, and a single one unchanged.

    Sums of floating-point numbers depend on their order, so the K values of each place are sorted before they are summed.
    """
    if not features:
        raise ValueError("there is no example pair in the list: give at least one, or None")
    if len(features) == 1:
        return features[0]
    return (sort_values(features).sum(dim=0) / len(features)).to(features[0].dtype)


@builds_networks
def load_controlnet(folder: Path, example_pair: bool) -> PromptDiffusionControlNet:
    """Load a ControlNet to start from, in float32: one of ours, or diffusers' own as ``from_controlnet`` takes it.

    The example stem is fresh where the folder has none, and omitted where ``example_pair`` is False. ValueError where the
    folder holds neither.
    """
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("_class_name")
        if kind == "ControlNetModel":
            source = ControlNetModel.from_pretrained(folder, use_safetensors=True).float()
            public: PromptDiffusionControlNet = PromptDiffusionControlNet.from_controlnet(source, example_pair)
            return public
        if kind != "PromptDiffusionControlNet":
            raise ValueError(f"it holds {kind!r}, not 'ControlNetModel' or 'PromptDiffusionControlNet'")
        found: PromptDiffusionControlNet = PromptDiffusionControlNet.from_pretrained(
            folder, use_safetensors=True
        ).float()
    except (OSError, ValueError) as error:
        raise ValueError(f"no ControlNet can be loaded from {folder} ({str(error).splitlines()[0]})") from error
    if found.uses_example_pair == example_pair:
        return found
    names = ("trunk_config", "stem_channels", "unit_query")
    kept = {name: found.config[name] for name in names}
    model: PromptDiffusionControlNet = PromptDiffusionControlNet(**kept, example_pair=example_pair)
    model.load_state_dict(_without(found.state_dict(), "example_stem."), strict=False)
    return model


def check_controlnet(
    controlnet: PromptDiffusionControlNet, unet: UNet2DConditionModel, stem_channels: Sequence[int]
) -> None:
    """Raise ValueError, with both values, where a ControlNet does not fit the base's UNet or the recipe's stems."""
    trunk = controlnet.trunk.config
    for name in _ARCHITECTURE:
        ours, theirs = (_as_tuple(config[name]) for config in (trunk, unet.config))
        if ours != theirs:
            raise ValueError(f"the ControlNet to start from has {name} {ours}, but the base's UNet has {theirs}")
    if tuple(controlnet.config["stem_channels"]) != tuple(stem_channels):
        raise ValueError(
            f"the ControlNet to start from has stem channels {tuple(controlnet.config['stem_channels'])}, but the recipe's "
            f"stem_channels are {tuple(stem_channels)}"
        )


def _list_fields(network: ConfigMixin) -> dict[str, Any]:
    """Return a network's configuration without diffusers' own notes in it."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def _as_tuple(value: Any) -> Any:  # noqa: ANN401 - any value of a configuration
    return tuple(value) if isinstance(value, list) else value


def _without(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(prefix)}


def trained_unet_parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Return the UNet's decoder by parameter name: what training moves beside the ControlNet.

    The published command unlocks SD's decoder (``output_blocks`` and ``out``): here the up blocks and the output layers.
    """
    prefixes = ("up_blocks.", "conv_norm_out.", "conv_out.")
    return {name: parameter for name, parameter in unet.named_parameters() if name.startswith(prefixes)}


def predict_noise(
    unet: UNet2DConditionModel,
    controlnet: PromptDiffusionControlNet,
    latents: Tensor,
    timesteps: Tensor,
    text: Tensor,
    condition_features: Tensor,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """Return the prediction N, 4, h, w (noise or v, whichever the base was trained to give)."""
    down, middle = controlnet(latents, timesteps, text, condition_features, conditioning_scale)
    prediction: Tensor = unet(
        latents,
        timesteps,
        encoder_hidden_states=text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]
    return prediction


__all__ = [
    "PUBLISHED_STEM_CHANNELS",
    "PromptDiffusionControlNet",
    "average_features",
    "check_controlnet",
    "load_controlnet",
    "predict_noise",
    "trained_unet_parameters",
]
