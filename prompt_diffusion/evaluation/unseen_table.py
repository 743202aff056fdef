"""The table of what a model never saw, as Markdown."""

from typing import Final

from prompt_diffusion.evaluation.unseen import FLOOR, MODEL, CaseResult, UnseenResult
from prompt_diffusion.evaluation.unseen_answers import TRIVIAL
from prompt_diffusion.evaluation.unseen_cases import Group

GROUP_TITLES: Final[dict[Group, str]] = {
    "new_draw": "new draw of a trained family",
    "composition": "new composition",
    "unseen": "family never seen",
    "counterfactual": "another palette",
    "adversarial": "misleading colours",
    "misaligned": "misaligned pair",
}
_HEADER = ("case", "what is new", "n", "model", "colours fitted", "objects right", *TRIVIAL, FLOOR)


def render_unseen(result: UnseenResult) -> str:
    """Return the table: RMSE of each case, the model's in bold where no answer without a model is as good."""
    lines = [_join(_HEADER), _join(["---", "---", *("---:" for _ in _HEADER[2:])])]
    lines += [_join(_list_cells(case)) for case in result.cases]
    held_out = [case for case in result.cases if case.group in ("new_draw", "composition", "unseen")]
    if held_out:
        num_better = sum(case.is_better for case in held_out)
        lines += ["", f"Better than every answer without a model: {num_better} of {len(held_out)} held-out families."]
    if result.switched is not None:
        lines += ["", f"Two palettes, one query: {100 * result.switched:.1f} % of object pixels are right under both."]
    lines += ["", *(_describe_coverage(case) for case in result.cases if case.num_covered < case.n)]
    return "\n".join(lines).rstrip() + "\n"


def _list_cells(case: CaseResult) -> list[str]:
    ours = case.answers[MODEL]
    value = f"**{ours.rmse:.3f}**" if case.is_better else f"{ours.rmse:.3f}"
    right = "" if ours.right is None else f"{100 * ours.right:.1f} %"
    others = (f"{case.answers[kind].rmse:.3f}" for kind in (*TRIVIAL, FLOOR))
    name = case.name.replace("_", " ")
    return [name, GROUP_TITLES[case.group], str(case.n), value, f"{ours.fitted_rmse:.3f}", right, *others]


def _describe_coverage(case: CaseResult) -> str:
    return f"{case.name}: of {case.n} examples {case.num_covered} show every class of the query."


def _join(cells: "list[str] | tuple[str, ...]") -> str:
    return f"| {' | '.join(cells)} |"
