"""Claim: annotating in batches, with decoding and encoding beside it, is never slower than the libraries' one-image paths.

For each annotator, in a process of its own, image files in, map files out: ours, and the loop that controlnet-aux or
transformers gives (decode, one image through their detector, encode), with the same weights (random, at the networks' real
size), in turn. The share of the time in which the device computes, and the memory that four times as many images add, are ours.
On a GPU where there is one. The last line is one JSON object; its ratio is the smallest of all annotators.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measuring import add_out_option, compare, describe_device, find_versions, finish, take_turns
from PIL import Image
from safetensors.torch import save_file

from prompt_diffusion.annotators.base import AnnotateResources, Annotator, ImageBatch
from prompt_diffusion.annotators.relief import build_midas_network
from prompt_diffusion.annotators.streaming import MapMaker
from prompt_diffusion.annotators.table import build_annotator
from prompt_diffusion.data.transforms import decode_image, encode_png, resize_image
from prompt_diffusion.store.fingerprint import compute_digest

OneImage = Callable[[ImageBatch], ImageBatch]
STAGES = ["stage1", "stage2", "stage3", "stage4"]


@dataclass
class Timed:
    """An annotator that notes how long it computes; results are on the CPU when it returns."""

    inner: Annotator
    seconds: list[float] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the protocol's own
        return getattr(self.inner, name)

    def annotate(self, images: ImageBatch) -> ImageBatch:
        """Pass on, and note the seconds."""
        started = time.perf_counter()
        maps = self.inner.annotate(images)
        self.seconds.append(time.perf_counter() - started)
        return maps


def build_pair(name: str, size: int, device: str, folder: Path) -> tuple[Annotator, OneImage]:
    """Return ours and the peer's one-image path, with the same random weights."""
    torch.manual_seed(0)
    network, one_image = PEERS[name](size, device)
    if network is None:
        return build_annotator(name), one_image
    file = folder / f"{name}.safetensors"
    if hasattr(network, "save_pretrained"):  # under the public names, as the hub has them
        network.save_pretrained(folder / name)
        (folder / name / "model.safetensors").rename(file)
    else:
        save_file({key: tensor.cpu().contiguous() for key, tensor in network.state_dict().items()}, file)
    places = AnnotateResources(weights=str(file), device=device)
    return build_annotator(name, places, compute_digest(file.read_bytes())), one_image


def peer_midas(size: int, device: str) -> tuple[Any, OneImage]:
    """controlnet-aux's MiDaS detector."""
    from controlnet_aux import MidasDetector

    network = build_midas_network().eval().to(device)
    detector = MidasDetector(network)
    return network, lambda image: detector(image, detect_resolution=size, image_resolution=size)


def peer_hed(size: int, device: str) -> tuple[Any, OneImage]:
    """controlnet-aux's HED detector."""
    from controlnet_aux import HEDdetector
    from controlnet_aux.hed import ControlNetHED_Apache2

    network = ControlNetHED_Apache2().eval().to(device)
    detector = HEDdetector(network)
    return network, lambda image: detector(image, detect_resolution=size, image_resolution=size, output_type="np")


def peer_lineart(size: int, device: str) -> tuple[Any, OneImage]:
    """controlnet-aux's line art detector."""
    from controlnet_aux import LineartDetector
    from controlnet_aux.lineart import Generator

    network = Generator(3, 1, 3).eval().to(device)
    detector = LineartDetector(network, network)
    return network, lambda image: detector(image, detect_resolution=size, image_resolution=size, output_type="np")


def peer_canny(size: int, device: str) -> tuple[Any, OneImage]:
    """controlnet-aux's Canny detector."""
    from controlnet_aux import CannyDetector

    detector = CannyDetector()
    return None, lambda image: detector(image, detect_resolution=size, image_resolution=size)


def peer_depth_anything(size: int, device: str) -> tuple[Any, OneImage]:
    """transformers' depth-estimation pipeline."""
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
        pipeline,
    )
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    stages = ["stage3", "stage6", "stage9", "stage12"]
    backbone = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, out_features=stages, reshape_hidden_states=False
    )
    network = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone)).eval()
    processor = DPTImageProcessor(
        size={"height": 518, "width": 518},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        do_pad=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    estimate = pipeline("depth-estimation", model=network, image_processor=processor, device=torch.device(device))

    def one_image(image: ImageBatch) -> ImageBatch:
        return np.repeat(np.asarray(estimate(Image.fromarray(image))["depth"])[..., None], 3, axis=2)

    return network, one_image


def peer_upernet(size: int, device: str) -> tuple[Any, OneImage]:
    """transformers' UperNet with its processor."""
    from transformers import ConvNextConfig, SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[96, 192, 384, 768], out_features=STAGES)
    config = UperNetConfig(backbone_config=backbone, auxiliary_in_channels=384, num_labels=150)
    network = UperNetForSemanticSegmentation(config).eval().to(device)
    processor = SegformerImageProcessor()
    return network, lambda image: segment(network, processor, image, device, {})


def peer_oneformer(size: int, device: str) -> tuple[Any, OneImage]:
    """transformers' OneFormer with its processor."""
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, OneFormerImageProcessor, SwinConfig

    backbone = SwinConfig(
        image_size=384,
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        out_features=STAGES,
    )
    config = OneFormerConfig(backbone_config=backbone, num_labels=150, num_queries=250)
    network = OneFormerForUniversalSegmentation(config).eval().to(device)
    processor = OneFormerImageProcessor(size={"shortest_edge": 640, "longest_edge": 2560})
    tokens = torch.tensor([[49406, 518, 10549, 533, 29119, 1550, 49407] + 70 * [0]], device=device)
    return network, lambda image: segment(
        network, processor, image, device, {"task_inputs": ["semantic"]}, {"task_inputs": tokens}
    )


def segment(
    network: Any,  # noqa: ANN401 - transformers' own
    processor: Any,  # noqa: ANN401
    image: ImageBatch,
    device: str,
    options: dict[str, Any],
    replaced: dict[str, Any] | None = None,
) -> ImageBatch:
    """Return one image's classes in colours, as the model cards show it."""
    from controlnet_aux.util import ade_palette

    found = processor(images=Image.fromarray(image), return_tensors="pt", **options)
    inputs = {key: found[key].to(device) for key in ("pixel_values", "pixel_mask") if key in found}
    with torch.inference_mode():
        outputs = network(**inputs, **(replaced or {}))
    classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])[0].cpu().numpy()
    return np.array(ade_palette(), np.uint8)[classes]


PEERS: dict[str, Callable[[int, str], tuple[Any, OneImage]]] = {
    "canny": peer_canny,
    "hed_controlnet": peer_hed,
    "lineart": peer_lineart,
    "depth_midas": peer_midas,
    "depth_anything_v2": peer_depth_anything,
    "seg_upernet": peer_upernet,
    "seg_oneformer": peer_oneformer,
}


def load_files(size: int, count: int) -> list[bytes]:
    """Return that many crops of a real photograph as PNG files."""
    from skimage import data

    photograph = np.asarray(data.astronaut(), np.uint8)
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        side = int(generator.integers(300, 513))
        top, left = generator.integers(0, 513 - side, 2)
        files.append(encode_png(resize_image(photograph[top : top + side, left : left + side], size)))
    return files


def measure(name: str, arguments: argparse.Namespace, device: str, folder: Path) -> dict[str, Any]:
    """Return images/s of both paths over several rounds, and what ours takes."""
    annotator, one_image = build_pair(name, arguments.image_size, device, folder)
    files = load_files(arguments.image_size, arguments.images)
    timed = Timed(annotator)
    resources = AnnotateResources(batch_size=arguments.batch_size, num_workers=arguments.workers)
    with MapMaker.open(lambda: timed, resources) as maker, torch.inference_mode():

        def run_ours() -> None:
            assert len(list(maker.make_maps(files))) == len(files)

        def run_peer() -> None:
            for file in files:
                encode_png(np.asarray(one_image(decode_image(file))))

        seconds = take_turns(arguments.rounds, {"ours": run_ours, "peer": run_peer})
        busy = sum(timed.seconds[-len(timed.seconds) * arguments.rounds // (arguments.rounds + 1) :]) / sum(
            seconds["ours"]
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if arguments.memory:
            sum(len(map_) for map_ in maker.make_maps(file for _ in range(4) for file in files))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "annotator": name,
        **compare(seconds, len(files)),
        "device_busy": round(busy, 3),
        "megabytes_more_for_four_times_the_images": round(grown / 1024, 1) if arguments.memory else None,
    }


def measure_apart(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one annotator in a process of its own, as a worker runs it: on a CPU, others before it slow it down."""
    command = [sys.executable, __file__, "--annotators", name]
    for option in ("image_size", "images", "batch_size", "workers", "rounds"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    command += [] if arguments.memory else ["--no-memory"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["annotators"][0]
    return result


def main() -> None:
    """Measure and print."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    # On a CPU, OneFormer (219 M parameters at 640 px) takes a quarter of a minute per image: by name only.
    names = [name for name in PEERS if has_gpu or name != "seg_oneformer"]
    parser.add_argument("--annotators", nargs="+", default=names, choices=list(PEERS))
    parser.add_argument("--image-size", type=int, default=512 if has_gpu else 256)
    parser.add_argument("--images", type=int, default=256 if has_gpu else 4)
    parser.add_argument("--batch-size", type=int, default=32 if has_gpu else 2)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    add_out_option(parser)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = "cuda" if has_gpu else "cpu"
    if len(arguments.annotators) == 1:
        with tempfile.TemporaryDirectory() as folder:
            results = [measure(arguments.annotators[0], arguments, device, Path(folder))]
    else:
        results = [measure_apart(name, arguments) for name in arguments.annotators]
    worst = min(results, key=lambda result: result["ratio"])
    result = {
        "name": "annotate",
        "ratio": worst["ratio"],
        "ours": worst["ours"],
        "peer": worst["peer"],
        "unit": f"images/s at {arguments.image_size} px in batches of {arguments.batch_size}: {worst['annotator']}, the worst",
        "spread": worst["spread"],
        "device": describe_device(),
        "versions": find_versions("torch", "transformers", "controlnet-aux"),
        "annotators": results,
    }
    finish(result, arguments.out)


if __name__ == "__main__":
    main()
