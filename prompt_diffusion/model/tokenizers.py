"""A tokenizer as somebody else wrote it: read from its folder, and refused in one sentence where it is none."""

from pathlib import Path

from transformers import CLIPTextModel, CLIPTokenizer

MAX_TEXT_BYTES = 32 << 20
"""Of one file of a configuration or a tokenizer; CLIP's whole tokenizer has 2 MB."""


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the CLIP tokenizer of a folder; ValueError says why there is none."""
    check_sizes(folder)
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the reader of tokenizer.json raises plain Exception
        raise ValueError((str(error).splitlines() or [""])[0] or type(error).__name__) from error
    return tokenizer


def check_tokenizer(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, where: str) -> None:
    """Raise ValueError where texts would become tokens, or more of them, than the text encoder has embeddings for."""
    config = text_encoder.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, and the text encoder knows {config.vocab_size}: it is "
            "another model's"
        )
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise ValueError(
            f"{where}: the tokenizer makes up to {tokenizer.model_max_length:.4g} tokens of a text, and the text encoder reads "
            f"{config.max_position_embeddings}: set model_max_length in tokenizer_config.json"
        )


def check_sizes(folder: Path) -> None:
    """Raise ValueError for a text file of a model that is larger than any: reading it would take minutes and gigabytes."""
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".txt") and path.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(
                f"{path} has {path.stat().st_size >> 20} MB, and up to {MAX_TEXT_BYTES >> 20} MB are read: it is no part of a "
                "model"
            )
