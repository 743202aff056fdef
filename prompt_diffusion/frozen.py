"""The one base of everything that is written down once and never changed: configurations, requests, references."""

from pydantic import BaseModel, ConfigDict, ValidationError


class FrozenModel(BaseModel):
    """A value with checked fields: an unknown field is refused, none can be assigned, and its docstring is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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
