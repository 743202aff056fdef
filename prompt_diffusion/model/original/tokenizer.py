"""The tokenizer of a checkpoint's text encoder, which no checkpoint of the original layout holds."""

from pathlib import Path

from transformers import CLIPTokenizer

from prompt_diffusion.model.mirror import find_model
from prompt_diffusion.model.references import SD_V1_5, download_snapshot
from prompt_diffusion.model.tokenizers import load_tokenizer as load_from_folder

CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(reference: str | None, store_root: str, cache_dir: Path) -> CLIPTokenizer:
    """Load a CLIP tokenizer: a folder that holds one (or a model with one), a hub's repository, or a mirrored one.

    None takes SD v1.5's: from the store's mirror of SD v1.5 where there is one, else CLIP's own from the hub. ValueError, in
    one sentence, where it cannot be had.
    """
    wanted = [reference] if reference else [SD_V1_5, CLIP_REPOSITORY]
    places = [Path(find_model(name, store_root, cache_dir)) for name in wanted]
    folder = next((place for place in places if place.is_dir()), None) or _fetch(wanted[-1])
    inner = folder / "tokenizer"
    return read_tokenizer(inner if inner.is_dir() else folder)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read a CLIP tokenizer from its folder; ValueError where it holds none."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers would make up an empty one
        raise ValueError(f"{folder} holds no CLIP tokenizer: neither {' nor '.join(_VOCABULARIES)}")
    try:
        return load_from_folder(folder)
    except ValueError as error:
        raise ValueError(f"{folder} holds no CLIP tokenizer that can be read ({error})") from error


def fit_tokenizer(tokenizer: CLIPTokenizer, vocabulary_size: int, num_positions: int) -> CLIPTokenizer:
    """Check that a tokenizer is of the text encoder's vocabulary, and let it cut texts at the encoder's length."""
    if len(tokenizer) != vocabulary_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the text encoder knows {vocabulary_size}: it is another model's "
            "tokenizer (--tokenizer names the right one)"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, num_positions)
    return tokenizer


def _fetch(repository: str) -> Path:
    try:
        return download_snapshot(repository, _FILES)
    except (OSError, ValueError) as error:  # no network, no such repository, no such name
        raise ValueError(
            f"the tokenizer {repository!r} cannot be had: it is no folder here, and the hub did not give it "
            f"({type(error).__name__}); a checkpoint holds none, so name a folder with SD v1.5's (--tokenizer FOLDER), or fill "
            f"the store's mirror once with `prompt-diffusion weights mirror-base {SD_V1_5}`"
        ) from error
