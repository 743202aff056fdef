"""The one base of everything that is written down once and never changed: configurations, requests, references."""

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A value with checked fields: an unknown field is refused, none can be assigned, and its docstring is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
