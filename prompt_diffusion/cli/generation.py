"""The commands that make images with a model: ``generate``, ``edit``, and ``settings``, which reads how one was made."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from prompt_diffusion.cli.files import check_out, read_picture_file, replace_file
from prompt_diffusion.cli.progress import show_steps
from prompt_diffusion.cli.shared import JsonOption, say_errors

if TYPE_CHECKING:
    from prompt_diffusion.generation import Generation, GenerationRequest

DEFAULT_MODEL = "models:/prompt-diffusion@challenger"

ModelOption = Annotated[
    str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, a folder, or a hub repository.")
]
OutOption = Annotated[Path, typer.Option(help="The PNG file to write; it carries its settings.")]
NegativeOption = Annotated[str, typer.Option("--negative-prompt", help="Text to steer away from.")]
SeedOption = Annotated[int, typer.Option(help="Seed: the same seed gives the same image.")]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps; default: the model's own.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance weight, 1 means none; default: the model's own.")]
StrengthOption = Annotated[float, typer.Option(help="Weight of example pairs and query, 1 as trained.")]
SchedulerOption = Annotated[
    str | None, typer.Option(metavar="ddim|dpm|unipc", help="The scheduler; default: the model's own.")
]
SizeOption = Annotated[int | None, typer.Option(help="Pixels per side; default: as the model was trained.")]
CountOption = Annotated[
    int,
    typer.Option(
        "--num-images", min=1, max=64, metavar="<int>", help="How many, with seeds SEED, SEED + 1, ...: out-SEED.png."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto uses a GPU if there is one.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]

_FIELDS = (
    "model",
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "controlnet_conditioning_scale",
    "scheduler",
    "size",
)
"""The fields of a request that both commands set, in the order of their options."""


class ExampleFiles(NamedTuple):
    """The two values of one --example."""

    source: Path
    target: Path


class PairsCommand(TyperCommand):
    """A command whose --example takes two values each time: Typer refuses lists of tuples, but its parser reads them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Typer's own
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if parameter.name == "example":
                parameter.nargs = 2


@say_errors
def generate(
    query: Annotated[Path, typer.Option(help="The image to apply the example to.")],
    out: OutOption,
    example: Annotated[
        list[ExampleFiles] | None,
        typer.Option(metavar="SOURCE TARGET", help="An example pair; several are averaged; none: text only."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text; if empty, the example pairs alone decide.")] = "",
    model: ModelOption = DEFAULT_MODEL,
    negative_prompt: NegativeOption = "",
    seed: SeedOption = 0,
    num_images: CountOption = 1,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    strength: StrengthOption = 1.0,
    scheduler: SchedulerOption = None,
    size: SizeOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do to the query what the example pair shows.

    Example: prompt-diffusion generate --example samples/scene.png samples/scene-seg.png --query samples/other.png --out seg.png
    """
    values = (model, prompt, negative_prompt, steps, guidance, strength, scheduler, size)
    fields = dict(zip(_FIELDS, values, strict=True))
    _make([fields | {"seed": seed + n} for n in range(num_images)], query, example or [], out, device, force, as_json)


@say_errors
def edit(
    image: Annotated[Path, typer.Argument(help="The image to edit.")],
    out: OutOption,
    prompt: Annotated[str, typer.Option(help="What the new image shows.")] = "",
    condition: Annotated[
        str, typer.Option(help="What to keep of the image: its depth, hed or seg map, made by the model itself.")
    ] = "depth",
    example: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="PHOTO MAP", help="A photograph and its map of that condition.")
    ] = None,
    by_example: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="BEFORE AFTER", help="Do to the image what was done here, instead of going through a map."
        ),
    ] = None,
    map_out: Annotated[Path | None, typer.Option(help="Write the map in between to this PNG file.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    negative_prompt: NegativeOption = "",
    seed: SeedOption = 0,
    num_images: CountOption = 1,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    strength: StrengthOption = 1.0,
    scheduler: SchedulerOption = None,
    size: SizeOption = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Edit an image by a new text (image to map, map to new image), or by an example of an edit.

    Example: prompt-diffusion edit samples/other.png --prompt "a red cube under a night sky" --out night.png

    Example: prompt-diffusion edit samples/other.png --by-example samples/scene.png samples/scene-edited.png --out edited.png
    """
    if by_example is not None and (example is not None or map_out is not None):
        raise ValueError("--by-example goes through no map: leave out --example and --map-out")
    values = (model, prompt, negative_prompt, steps, guidance, strength, scheduler, size)
    fields = dict(zip(_FIELDS, values, strict=True))
    if by_example is None:
        fields |= {"mode": "edit", "condition": condition}
    pair = by_example or example
    requests = [fields | {"seed": seed + n} for n in range(num_images)]
    _make(requests, image, [pair] if pair else [], out, device, force, as_json, map_out)


@say_errors
def settings(
    image: Annotated[Path, typer.Argument(help="A PNG file that generate, edit or the studio made.")],
    as_json: JsonOption = False,
) -> None:
    """Show how an image was made: its model, seed and settings, and digests of the images that went in.

    Example: prompt-diffusion settings result.png --json
    """
    from prompt_diffusion.generation import read_record

    data = read_picture_file(image)
    try:
        record = read_record(data)
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from None
    if as_json:
        print(record.model_dump_json(indent=2))
        return
    for name, value in record.request.model_dump(exclude_none=True).items():
        print(f"{name}: {value if value != '' else '(none)'}")
    if record.model_fingerprint:
        print(f"model_fingerprint: {record.model_fingerprint}")
    for name, digest in record.images.items():
        print(f"sha256 of {name.replace('_', ' ')}: {digest}")
    print("made with: " + ", ".join(f"{name} {version}" for name, version in record.versions.items()))


def _make(
    fields: list[dict[str, Any]],
    query: Path,
    examples: Sequence[tuple[Path, Path]],
    out: Path,
    device: str,
    is_forced: bool,
    as_json: bool,
    map_out: Path | None = None,
) -> None:
    """Check everything, load the model, and write one image per request."""
    from prompt_diffusion.generation import build_request, encode_result

    requests = [build_request(each) for each in fields]
    outs = [out] if len(requests) == 1 else [out.with_stem(f"{out.stem}-{request.seed}") for request in requests]
    for path in (*outs, *([map_out] if map_out else [])):
        check_out(path, is_forced)
    files = [(read_picture_file(source), read_picture_file(target)) for source, target in examples]
    image = read_picture_file(query)
    made = []
    for path, generation in zip(outs, _run(requests, image, files, device), strict=True):
        replace_file(path, encode_result(generation.image, generation.record))
        for note in generation.notes:
            print(f"prompt-diffusion: {note}", file=sys.stderr)
        made.append({"file": str(path), **generation.record.model_dump(mode="json")})
        if map_out is not None and generation.condition_map is not None:
            from prompt_diffusion.data.transforms import encode_png

            replace_file(map_out, encode_png(generation.condition_map))
            made[-1]["map_file"] = str(map_out)
        request = generation.record.request
        print(
            f"{path}: by {request.model}, {request.size} x {request.size} pixels, seed {request.seed}, "
            f"{request.num_inference_steps} steps, guidance {request.guidance_scale:g}",
            file=sys.stderr,
        )
    if as_json:
        import json

        print(json.dumps(made if len(made) > 1 else made[0], indent=2))


def _run(
    requests: Sequence["GenerationRequest"], query: bytes, examples: list[tuple[bytes, bytes]], device: str
) -> Iterator["Generation"]:
    """Load the model once, and yield one result per request."""
    from prompt_diffusion.generation import open_model, run_request
    from prompt_diffusion.settings import load_settings

    try:
        model = open_model(requests[0].model, load_settings(), device)
        for request in requests:
            with show_steps(f"seed {request.seed}") as on_step:
                generation = run_request(request, model, query, examples, on_step)
            yield generation
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; what was finished is kept") from None
