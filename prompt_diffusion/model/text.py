"""Text into the text encoder, and what of it is cut."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

Texts = str | Sequence[str]


@torch.no_grad()
def encode_texts(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    texts: Sequence[str],
    device: torch.device | str,
    clip_skip: int | None = None,
) -> Tensor:
    """Return text embeddings: N, L, C. Text beyond the encoder's length is cut.

    ``clip_skip`` leaves out that many of the encoder's last layers, before its final normalisation; None is 0.
    """
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    ids = tokens.input_ids.to(device)
    if clip_skip is None:
        hidden: Tensor = text_encoder(ids).last_hidden_state
        return hidden
    layers = text_encoder(ids, output_hidden_states=True).hidden_states
    normalised: Tensor = text_encoder.final_layer_norm(layers[-(clip_skip + 1)])
    return normalised


@dataclass(frozen=True)
class CallTexts:
    """What both branches of a call are conditioned on: texts, or embeddings N, L, C in their place."""

    prompts: list[str] | Tensor
    negatives: list[str] | Tensor

    def repeat(self, count: int) -> Self:
        """Return one of each for each of a batch of ``count``; one alone serves all."""
        return replace(self, prompts=_repeat(self.prompts, count), negatives=_repeat(self.negatives, count))

    def convert(self, change: Callable[[str], str]) -> Self:
        """Return the same with every text changed; embeddings stay."""
        prompts, negatives = (
            [change(text) for text in texts] if isinstance(texts, list) else texts
            for texts in (self.prompts, self.negatives)
        )
        return replace(self, prompts=prompts, negatives=negatives)

    @property
    def are_equal(self) -> bool:
        """Whether both branches see the same texts, so that guidance would find no difference."""
        return isinstance(self.prompts, list) and self.prompts == self.negatives

    def encode(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        device: torch.device | str,
        dtype: torch.dtype,
        is_guided: bool,
        clip_skip: int | None,
    ) -> Tensor:
        """Return N, L, C; with guidance 2 N, the negative prompts first. What the encoder does not read is logged."""
        embeds = []
        for name, texts in {"negative_prompt": self.negatives, "prompt": self.prompts}.items():
            if name == "negative_prompt" and not is_guided:
                continue
            if isinstance(texts, list):
                warn_of_cut_texts(tokenizer, texts, name)
                texts = encode_texts(tokenizer, text_encoder, texts, device, clip_skip)
            embeds.append(texts.to(device, dtype))
        if is_guided and embeds[0].shape[1] != embeds[1].shape[1]:
            raise ValueError(
                f"prompt and negative prompt must have embeddings of one length, got {embeds[1].shape[1]} and "
                f"{embeds[0].shape[1]} tokens"
            )
        return torch.cat(embeds)


def read_texts(
    prompt: object, prompt_embeds: object, negative_prompt: object, negative_prompt_embeds: object, channels: int
) -> CallTexts:
    """Return the texts of a call; ValueError for what is no text and no embedding, for two forms of one, and for no prompt."""
    if prompt is None and prompt_embeds is None:
        raise ValueError('give a prompt ("" lets the example pair decide alone) or prompt_embeds')
    given = {"prompt": (prompt, prompt_embeds), "negative_prompt": (negative_prompt or None, negative_prompt_embeds)}
    read = []
    for name, (texts, embeds) in given.items():
        if texts is not None and embeds is not None:
            raise ValueError(f"{name} and {name}_embeds are two forms of one text: give one of them")
        listed = _list_texts("" if texts is None else texts, name)
        read.append(listed if embeds is None else _check_embeds(embeds, f"{name}_embeds", channels))
    return CallTexts(*read)


def check_clip_skip(clip_skip: object, text_encoder: CLIPTextModel) -> int | None:
    """Return how many of the encoder's last layers are left out; ValueError for more than it has, and for no whole number."""
    if clip_skip is None:
        return None
    layers = text_encoder.config.num_hidden_layers
    if not isinstance(clip_skip, int) or isinstance(clip_skip, bool) or not 0 <= clip_skip <= layers:
        raise ValueError(f"clip_skip must be a whole number between 0 and {layers}, got {clip_skip!r}")
    return clip_skip


def _list_texts(texts: object, name: str) -> list[str]:
    listed: list[Any] = list(texts) if isinstance(texts, list | tuple) else [texts]
    wrong = [type(text).__name__ for text in listed if not isinstance(text, str)]
    if wrong or not listed:
        raise ValueError(f"{name} is a text or a list of texts, got {wrong[0] if wrong else 'an empty list'}")
    return listed


def _check_embeds(embeds: object, name: str, channels: int) -> Tensor:
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[2] != channels or 0 in embeds.shape:
        found = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"{name} is a tensor N, L, {channels}: texts, tokens, channels; got {found}")
    if not bool(torch.isfinite(embeds).all()):
        raise ValueError(f"{name} has values that are not finite")
    return embeds


def _repeat(texts: list[str] | Tensor, count: int) -> list[str] | Tensor:
    if len(texts) == count:
        return texts
    return texts * count if isinstance(texts, list) else texts.expand(count, -1, -1)


def find_cut_text(tokenizer: CLIPTokenizer, text: str) -> str:
    """Return what of a text the encoder does not read, as it was written: "" where it reads all."""
    longest = tokenizer.model_max_length
    tokens = tokenizer(text, return_offsets_mapping=True, verbose=False)
    if len(tokens.input_ids) <= longest:
        return ""
    # the last place is the end's own
    first_cut, _ = tokens.offset_mapping[longest - 1]
    return text[first_cut:]


def warn_of_cut_texts(tokenizer: CLIPTokenizer, texts: Sequence[str], name: str) -> None:
    """Log, for each text that is too long, exactly what of it is not read."""
    for text in dict.fromkeys(texts):
        cut = find_cut_text(tokenizer, text)
        if cut:
            logger.warning(
                "%s is cut: the text encoder reads %d tokens, and %r is not read", name, tokenizer.model_max_length, cut
            )
