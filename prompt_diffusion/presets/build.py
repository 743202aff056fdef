"""A preset with single fields changed by dotted name, validated."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from prompt_diffusion.frozen import say_first_error
from prompt_diffusion.presets.config import RunConfig
from prompt_diffusion.presets.published import paper
from prompt_diffusion.presets.small import demo, smoke
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.encode import EncodeConfig

_MAX_DEPTH = 20
_PRESETS = {"smoke": smoke, "demo": demo, "paper": paper}


def build_preset(name: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Return a preset with single fields changed by dotted name, for example ``{"train.num_steps": 100}``.

    ValueError, in one sentence, names an unknown preset or field, or the field, the value and what is allowed.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(_PRESETS)}")
    content = _PRESETS[name]().model_dump()
    for key, value in (overrides or {}).items():
        _override(content, key, value)
    _join_bases(content, is_chosen=bool({"encode", "encode.base"} & set(overrides or {})))
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ValueError(say_first_error(error, whole=name)) from None


def _join_bases(content: dict[str, Any], *, is_chosen: bool) -> None:
    """Let the encoders follow the training's base; ValueError where another was chosen for them."""
    encode, train = content["encode"], content["train"]
    if not (isinstance(encode, dict) and isinstance(train, dict)):
        return  # what is not a configuration at all is refused as such
    base = train.get("base", TrainConfig().base)
    if encode.get("base", EncodeConfig.model_fields["base"].default) == base:
        return
    if is_chosen:
        raise ValueError(f"encode.base {encode.get('base')!r} and train.base {base!r} must be the same")
    encode["base"] = base


def _override(content: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401 - any field's value
    """Set one field of a nested dictionary (lists by position); ValueError names the nearest field that exists."""
    _check_depth(key, value)
    *path, last = key.split(".")
    inner: Any = content
    for depth, part in enumerate([*path, last]):
        names = (
            [str(i) for i in range(len(inner))]
            if isinstance(inner, list | tuple)
            else list(inner)
            if isinstance(inner, dict)
            else []
        )
        if not isinstance(inner, dict | list | tuple) or part not in names:
            where = ".".join(path[:depth])
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown field {key!r}: {hint}{f'{where} has' if where else 'there are'} {', '.join(names) or 'no fields'}"
            )
        if depth == len(path):
            break
        if isinstance(inner, list | tuple):
            inner = inner[int(part)]
        else:
            if isinstance(inner[part], tuple):
                inner[part] = list(inner[part])
            inner = inner[part]
    inner[int(last) if isinstance(inner, list) else last] = value


def _check_depth(key: str, value: Any) -> None:  # noqa: ANN401 - any field's value
    """Refuse what is nested deeper than any field."""
    layer, depth = [value], 0
    while layer := [
        inner
        for each in layer
        if isinstance(each, dict | list | tuple)
        for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"{key}: no field is nested deeper than {_MAX_DEPTH} levels, and this value is")
