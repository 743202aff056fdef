"""The model card: Markdown, rendered from a version's facts and measurements."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_diffusion.model.references import HUB_NAME
from prompt_diffusion.registry.facts import UNKNOWN, ModelFacts
from prompt_diffusion.tracking.facts import flatten

if TYPE_CHECKING:
    from jinja2 import Template

MAX_DESCRIPTION = 5000
"""Maximum length of a description in MLflow's databases, in characters."""
MEASURES = {
    "rmse": "RMSE of the map, RGB in [0, 1]",
    "frechet_distance": "Fréchet distance of EfficientNet features (no FID)",
    "FID": "FID, Inception features",
    "FID_legacy": "FID, Inception features, the network's own resizing",
}
_HUB_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit", "CreativeML OpenRAIL-M": "creativeml-openrail-m"}


def render_card(facts: ModelFacts, uri: str, metrics: Mapping[str, float]) -> str:
    """Return the whole card, with the front matter that hubs read: licence, base, library and tags."""
    return _render(facts, uri, metrics, front_matter=True, with_recipe=True)


def render_description(facts: ModelFacts, uri: str, metrics: Mapping[str, float]) -> str:
    """Return the card for MLflow's page: no front matter, and no longer than its databases allow."""
    whole = _render(facts, uri, metrics, front_matter=False, with_recipe=True)
    if len(whole) <= MAX_DESCRIPTION:
        return whole
    short = _render(facts, uri, metrics, front_matter=False, with_recipe=False)
    ending = "\n\nThe rest is in `README.md` beside the model.\n"
    return (
        short if len(short) <= MAX_DESCRIPTION else short[: MAX_DESCRIPTION - len(ending)].rpartition("\n")[0] + ending
    )


def _render(facts: ModelFacts, uri: str, metrics: Mapping[str, float], *, front_matter: bool, with_recipe: bool) -> str:
    text = _load_template().render(
        facts=facts,
        uri=uri,
        metrics=dict(sorted(metrics.items())),
        measures=MEASURES,
        recipe=flatten(facts.configuration) if with_recipe else {},
        front_matter=front_matter,
        # a model is a derivative of its base: whoever redistributes it is bound by the base's licence
        hub_licence=_name_licence(facts.licences.get("base", UNKNOWN)),
        hub_base=facts.base.partition("@")[0] if HUB_NAME.fullmatch(facts.base) else None,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _name_licence(licence: str) -> str:
    """Return what hubs call a licence, which may be followed by remarks."""
    known = (name for text, name in _HUB_LICENCES.items() if licence.startswith(text))
    return next(known, UNKNOWN if licence.startswith(UNKNOWN) else "other")


@lru_cache(maxsize=1)
def _load_template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=False
    )
    return environment.get_template("card.md.jinja")
