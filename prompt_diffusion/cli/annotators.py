"""The commands ``annotate``, ``weights`` and ``annotators``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from prompt_diffusion.cli.files import check_out, read_picture_file, replace_file
from prompt_diffusion.cli.shared import JsonOption, StoreOption, say_errors

weights_app = typer.Typer(
    help="Weights of annotators and bases, and the store's own copies of them.", no_args_is_help=True
)
annotators_app = typer.Typer(help="What makes condition maps.", no_args_is_help=True)

FromOption = Annotated[
    str | None, typer.Option("--from", help="A file or folder that holds the weights; default: package or hub.")
]


@say_errors
def annotate(
    image: Annotated[Path, typer.Argument(help="A photograph.")],
    annotator: Annotated[
        str,
        typer.Option(
            "--with", help="depth, hed, seg, normal, canny, scribble or lineart, or one of `annotators list` by name."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")],
    size: Annotated[
        int | None, typer.Option(min=8, max=4096, help="First cut the centre square and resize it to this.")
    ] = None,
    place: FromOption = None,
    store: StoreOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda; auto uses a GPU if there is one.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the condition map of a photograph.

    A condition's name selects its first annotator whose weights are on this machine; the output says which.

    Example: prompt-diffusion annotate samples/photo.jpg --with hed --out edges.png
    """
    from prompt_diffusion.annotators.base import AnnotateResources
    from prompt_diffusion.annotators.choose import choose_annotator
    from prompt_diffusion.annotators.shards import MIRROR
    from prompt_diffusion.annotators.table import build_annotator
    from prompt_diffusion.data.transforms import decode_image, encode_png, resize_image
    from prompt_diffusion.settings import load_settings
    from prompt_diffusion.store.uris import join_uri

    check_out(out, force)
    pixels = decode_image(read_picture_file(image))
    pixels = pixels if size is None else resize_image(pixels, size)
    mirrored = join_uri(store or load_settings().store, MIRROR)
    resources = AnnotateResources(weights=place, weights_mirror=mirrored, device=device)
    spec = choose_annotator(annotator, resources)
    built = build_annotator(spec.name, resources)
    replace_file(out, encode_png(built.annotate(pixels[None])[0]))
    height, width = pixels.shape[:2]
    facts = {
        "file": str(out),
        "condition": spec.condition,
        "annotator": spec.name,
        "version": spec.version,
        "weights": built.weights_digest or None,
        "width": width,
        "height": height,
    }
    print(f"{out}: {spec.condition} map by {spec.name}, {width} x {height} pixels", file=sys.stderr)
    if as_json:
        print(json.dumps(facts, indent=2))


@weights_app.command()
@say_errors
def mirror(
    names: Annotated[list[str] | None, typer.Argument(help="Annotators; default: those of the preset 'paper'.")] = None,
    store: StoreOption = None,
    place: FromOption = None,
) -> None:
    """Copy weights into the store, checked, for machines that cannot reach the hub.

    Example: prompt-diffusion weights mirror depth_midas seg_upernet --store s3://bucket/store
    """
    from prompt_diffusion.annotators.base import AnnotateResources
    from prompt_diffusion.annotators.shards import MIRROR
    from prompt_diffusion.annotators.table import find_annotator
    from prompt_diffusion.annotators.weights import mirror_weights
    from prompt_diffusion.presets import paper
    from prompt_diffusion.settings import load_settings
    from prompt_diffusion.store.fingerprint import compute_digest
    from prompt_diffusion.store.storage import check_writable
    from prompt_diffusion.store.uris import join_uri

    root = store or load_settings().store
    specs = [find_annotator(name) for name in names or [config.annotator for config in paper().annotate]]
    check_writable(root)
    for weights in dict.fromkeys(spec.weights for spec in specs if spec.weights is not None):
        file = mirror_weights(weights, join_uri(root, MIRROR), AnnotateResources(weights=place))
        print(f"{weights.file}  {len(file.data) / 1e6:.1f} MB  sha256 {compute_digest(file.data)}")


@weights_app.command("mirror-base")
@say_errors
def mirror_base_command(
    repository: Annotated[str, typer.Argument(help="A hub repository, NAME or NAME@REVISION: a base or a ControlNet.")],
    store: StoreOption = None,
    place: Annotated[
        Path | None, typer.Option("--from", help="A folder with a copy fetched elsewhere; default: the hub.")
    ] = None,
) -> None:
    """Copy a base into the store, where trainings find it under the same name on machines that cannot reach the hub.

    Example: prompt-diffusion weights mirror-base stable-diffusion-v1-5/stable-diffusion-v1-5 --store s3://bucket/store
    """
    from prompt_diffusion.model.mirror import mirror_base
    from prompt_diffusion.settings import load_settings
    from prompt_diffusion.store.storage import check_writable

    root = store or load_settings().store
    check_writable(root)
    for path, digest in mirror_base(repository, root, place).items():
        print(f"{path}  sha256 {digest}")


@annotators_app.command("list")
@say_errors
def list_annotators(store: StoreOption = None) -> None:
    """Show every annotator, what it makes, and whether the weights that it needs are on this machine or in the store.

    Example: prompt-diffusion annotators list
    """
    from prompt_diffusion.annotators.base import AnnotateResources
    from prompt_diffusion.annotators.choose import can_run
    from prompt_diffusion.annotators.shards import MIRROR
    from prompt_diffusion.annotators.table import ANNOTATORS
    from prompt_diffusion.settings import load_settings
    from prompt_diffusion.store.uris import join_uri

    resources = AnnotateResources(weights_mirror=join_uri(store or load_settings().store, MIRROR))
    grid = Table("annotator", "condition", "runs here", "weights, pinned by", box=box.SIMPLE_HEAD)
    grid.columns[-1].overflow = "fold"
    for name, spec in ANNOTATORS.items():
        weights = spec.weights
        pin = "" if weights is None else f"\nsha256 {weights.sha256[:12]}" if weights.sha256 else "\nthe hub's commit"
        is_here = "yes" if can_run(spec, resources) else "no"
        grid.add_row(name, spec.condition, is_here, f"{weights.file if weights else 'none needed'}{pin}")
    Console(highlight=False).print(grid)


@annotators_app.command()
@say_errors
def depth_error(
    name: Annotated[str, typer.Argument(help="A depth annotator.")] = "depth_midas",
    place: FromOption = None,
    out: Annotated[Path | None, typer.Option(help="Write photograph, map and truth to this PNG file.")] = None,
) -> None:
    """Measure a depth annotator against the true disparity of scikit-image's motorcycle, up to scale and shift.

    Example: prompt-diffusion annotators depth-error depth_anything_v2
    """
    from prompt_diffusion.annotators.base import AnnotateResources
    from prompt_diffusion.annotators.depth_error import measure_motorcycle, render_motorcycle
    from prompt_diffusion.annotators.table import build_annotator, find_annotator
    from prompt_diffusion.data.transforms import encode_png

    spec = find_annotator(name)
    if spec.condition != "depth":
        raise ValueError(f"annotator {name!r} makes {spec.condition} maps: depth-error measures depth maps")
    annotator = build_annotator(name, AnnotateResources(weights=place))
    errors = measure_motorcycle(annotator)
    for field, value in vars(errors).items():
        print(f"{field}: {value:.4f}" if isinstance(value, float) else f"{field}: {value}")
    if out is not None:
        out.write_bytes(encode_png(render_motorcycle(annotator)))
        print(f"picture: {out}", file=sys.stderr)
