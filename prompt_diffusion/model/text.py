"""Text into the text encoder, and what of it is cut."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_texts(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: Sequence[str], device: torch.device | str
) -> Tensor:
    """Return text embeddings: N, L, C. Text beyond the encoder's length is cut."""
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    hidden: Tensor = text_encoder(tokens.input_ids.to(device)).last_hidden_state
    return hidden


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
