"""The one base of everything that is written down once and never changed: configurations, requests, references."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class FrozenModel(BaseModel):
    """A value with checked fields: an unknown field is refused, none can be assigned, and its docstring is its description.

    Numbers are finite, and `true` is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - any field's value
        """Refuse `true` where a number is asked for, which Python takes for 1."""
        assert info.field_name is not None
        if _holds_truth(value) and _is_plain_number(cls.model_fields[info.field_name].annotation):
            raise ValueError("Input should be a number, not true or false")
        return value


def _holds_truth(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, dict | list | tuple):
        return any(_holds_truth(each) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool)


def _is_plain_number(annotation: Any) -> bool:  # noqa: ANN401 - a type
    """Say whether a field's type is made of numbers and texts alone, in any container: no truth value and no model in it."""
    inner = get_args(annotation)
    if not inner:
        return annotation in (int, float)
    kinds = [each for each in inner if each not in (type(None), str, Ellipsis)]
    return bool(kinds) and all(_is_plain_number(each) for each in kinds)
