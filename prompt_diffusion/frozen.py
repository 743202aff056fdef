"""The one base of everything that is written down once and never changed: configurations, requests, references."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class FrozenModel(BaseModel):
    """A value with checked fields: an unknown field is refused, none can be assigned, and its docstring is its description.

    Numbers are finite, and `true` is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_truth_values(cls, content: Any) -> Any:  # noqa: ANN401 - whatever a caller gives
        """Have `true` refused where a number is asked for, which pydantic takes for 1: as a word it is none."""
        if not isinstance(content, dict):
            return content
        fields = cls.model_fields
        return {
            name: _name_truth(value) if name in fields and _is_of_numbers(fields[name].annotation) else value
            for name, value in content.items()
        }


def _name_truth(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _name_truth(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_name_truth(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


def _is_of_numbers(annotation: Any) -> bool:  # noqa: ANN401 - a type
    """Say whether a field's type is made of numbers alone, in any container: no truth value and no model in it."""
    inner = get_args(annotation)
    if not inner:
        return annotation in (int, float)
    values = inner[1:] if get_origin(annotation) is dict else inner
    kinds = [each for each in values if each not in (type(None), Ellipsis)]
    return bool(kinds) and all(_is_of_numbers(each) for each in kinds)


def say_first_error(error: ValidationError, whole: str = "") -> str:
    """Return the first thing that is wrong, in one sentence: the field, what is allowed and what was given.

    ``whole`` names the value where it is none of its fields that is wrong, but how they go together.
    """
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        return f"{whole}: {message}" if whole else message
    given = repr(first["input"])
    return f"{place}: {message}, got {given if len(given) <= 80 else f'{given[:77]}...'}"
