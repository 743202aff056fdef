"""What the numbers of a benchmark say, and what to know before using them: sentences made only from the numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from prompt_diffusion.evaluation.config import METHODS, Method
from prompt_diffusion.evaluation.in_context import NONE, InContextResult
from prompt_diffusion.evaluation.provenance import CellSources
from prompt_diffusion.evaluation.table import BenchmarkTable, name_task
from prompt_diffusion.vision_tasks import VISION_TASKS, ExamplePolicy

# The 97.5 % quantile of the normal distribution, for 95 % intervals.
_Z: Final = 1.959964
_POLICY_TITLES: Final[Mapping[ExamplePolicy, str]] = {
    "same_group": "the query's own prompt group (same_group)",
    "same_row": "the query's own twin (same_row)",
    "other_group": "another prompt group (other_group)",
}


def list_facts(
    table: BenchmarkTable, sources: Sequence[CellSources], samples_seen: Mapping[Method, Sequence[int]]
) -> list[tuple[str, str]]:
    """Return the header's facts: what was measured on what; ``samples_seen`` of each vision task, by method."""
    config = sources[0].generations.identity.config
    data = table.provenance["data"]
    policies = {source.generations.identity.config["example_policy"] for source in sources} - {None}
    samplers = [_name_sampler(sources, direction) for direction in ("map_to_image", "image_to_map")]
    sizes = ", ".join(sorted({str(cell.n) for cell in table.cells}))
    return [
        ("data", f"{data['source']['kind']}, {data['image_size']} px, {data['rows']:,} image pairs"),
        ("measured on", f"the first {sizes} of the {config['split']} split"),
        ("example pair from", ", ".join(_POLICY_TITLES[policy] for policy in sorted(policies)) or "none shown"),
        ("sampler", "; ".join(filter(None, samplers))),
        ("training samples of each vision task", "; ".join(f"{m} {_name_range(c)}" for m, c in samples_seen.items())),
        ("made", table.provenance["created"].replace("T", " ").replace("+00:00", " UTC")),
    ]


def list_findings(table: BenchmarkTable) -> list[str]:
    """Return what the numbers say, in sentences made only from them."""
    return [
        *_compare_methods(table),
        *_compare_trivial(table),
        *_compare_floor(table),
        _describe_in_context(table.in_context),
    ]


def list_caveats(table: BenchmarkTable) -> list[str]:
    """Return what a reader has to know before using a number."""
    caveats = []
    if any(cell.metric == "frechet_distance" for cell in table.cells):
        caveats.append(
            "A Fréchet distance with EfficientNet-Lite0 features is not FID. It has another scale, so it can be set "
            "beside other rows of this table, and not beside the paper's FID."
        )
    floors = [cell.floor for cell in table.cells if cell.extractor is not None]
    if floors:
        n, floor = min(cell.n for cell in table.cells if cell.extractor is not None), max(floors)
        caveats.append(
            f"A Fréchet distance grows as n shrinks, whatever the images: two sets of real images, {n} each, are "
            f"{floor:.2f} apart. That is the floor. Outputs are made from the truths' own maps, so they share layouts "
            "with them and may come below it."
        )
    caveats += [
        "The floor of an RMSE is the error of the truth's own trip through the VAE, which every output has to make.",
        "One training run and one set of seeds stand behind each number: small differences are noise.",
        "CN(FT) is this repository's own: one vision task at a time, the query and the text without an example pair, "
        "and the samples that the header says. The paper's exact schedule is not public.",
        "The paper's numbers are for other data (InstructPix2Pix, 256 px, 10,000 images) and a far larger model.",
    ]
    return caveats


def compute_interval(num_right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson's score (JASA 22, 1927): it stays within [0, 1] at 0 and n."""
    share = num_right / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _compare_methods(table: BenchmarkTable) -> list[str]:
    shared = [task for task in table.vision_tasks if all(table.find_cell(method, task) for method in METHODS)]
    lower = []
    for task in shared:
        ours, baseline = table.find_cell("Prompt Diffusion", task), table.find_cell("CN(FT)", task)
        assert ours is not None
        assert baseline is not None
        if ours.value < baseline.value:
            lower.append(name_task(task))
    if not shared:
        return []
    which = f": {', '.join(lower)}" if 0 < len(lower) < len(shared) else ""
    return [f"Prompt Diffusion is lower than CN(FT) in {len(lower)} of {len(shared)} vision tasks{which}."]


def _compare_trivial(table: BenchmarkTable) -> list[str]:
    parts = []
    for task in table.vision_tasks:
        cell = table.find_cell("Prompt Diffusion", task)
        trivial = [t for t in table.trivial if t.vision_task == task]
        if cell is not None and trivial:
            best = min(trivial, key=lambda t: t.value)
            share = 100 * cell.value / best.value
            parts.append(f"{share:.0f} % for {name_task(task)} ({best.baseline.replace('_', ' ')})")
    return [f"Its RMSE, in parts of the best answer that needs no model: {', '.join(parts)}."] if parts else []


def _compare_floor(table: BenchmarkTable) -> list[str]:
    cells = [c for c in table.cells if c.method == "Prompt Diffusion" and c.extractor is not None and c.floor > 0]
    parts = [f"{c.value / c.floor:.1f} for {name_task(c.vision_task)}" for c in cells]
    return [f"Its Fréchet distance, in multiples of the floor: {', '.join(parts)}."] if parts else []


def _describe_in_context(result: InContextResult) -> str:
    with_pair = [
        (row[index], sum(row))
        for index, (label, row) in enumerate(zip(result.labels, result.confusion, strict=True))
        if label != NONE
    ]
    num_right, n = sum(right for right, _ in with_pair), sum(total for _, total in with_pair)
    low, high = compute_interval(num_right, n)
    return (
        f"With no text, the example pair alone brings out its own map in {num_right} of {n} outputs "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %)."
    )


def _name_sampler(sources: Sequence[CellSources], direction: str) -> str:
    """Return the steps and guidance weights of one direction's cells; "" where there are none."""
    configs = [
        source.generations.identity.config
        for source in sources
        if VISION_TASKS[source.result.vision_task].direction == direction
    ]
    used = sorted({(config["num_inference_steps"], config["guidance_scale"]) for config in configs})
    parts = [f"{steps} steps, guidance {scale:g}" for steps, scale in used]
    return f"{direction.replace('_', ' ')}: {' and '.join(parts)}" if parts else ""


def _name_range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
