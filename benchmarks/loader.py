"""Claim: a warm loader makes micro-batches many times as fast as the published one, on the same samples and one core.

Ours: whole micro-batches (example pair and query as uint8, posterior sample, noise, timestep, text embedding; latents and text
in SD v1.5's shapes) over a warm local shard cache, that is after the first epoch. The published loader: four 512 px JPEGs a
sample, opened, resized by Lanczos to 256 px and stacked as float32, and nothing else. Also measured: webdataset, litdata and
mosaicml-streaming fed the same samples, each a finished record (``_loader_peers.py``: their best case), and ours from a real
S3 server, in the first epoch (an empty cache: shards are fetched and decoded) and after it.

Fed PNG, as they recommend, the libraries decode three images per sample. Fed raw pixels they decode none, and the best of them
comes near: both then copy the same bytes from the page cache and draw the same noise. It does so only because a record is one
finished sample: three times the bytes of our cache for one fixed example per vision task, and no other example ever.

The warm figure holds where the disk has room for the whole cache (see the bytes per row); with less, shards are fetched and
decoded again in every epoch, at the first epoch's rate. Here the cache lies in the machine's page cache.

Everything runs in one process pinned to one core, in turns; only the S3 server has the other cores. The images are ray-cast
scenes, which are easier to decode than photographs: that favours the peers, ours decodes nothing. A library that is not
installed is reported as absent. They want other versions of our own dependencies, so put them beside the environment, e.g.

    pip install --target PEERS --no-deps webdataset braceexpand litdata lightning-utilities tifffile obstore boto3 s3transfer \\
        mosaicml-streaming brotli python-snappy cramjam xxhash zstd catalogue
    PYTHONPATH=PEERS python benchmarks/loader.py

(boto3 of the release of the botocore that is there.) The last line is one JSON object.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from _loader_peers import (
    FORMS,
    LIBRARIES,
    Collator,
    LibraryLoader,
    PublishedLoader,
    build_record,
    count_bytes,
    write_jpegs,
)
from _measuring import add_out_option, describe_device, find_versions, finish, take_turns

from prompt_diffusion.annotators.annotate import Annotate
from prompt_diffusion.annotators.base import AnnotateResources
from prompt_diffusion.annotators.config import AnnotateConfig
from prompt_diffusion.data.dataset import number_captions
from prompt_diffusion.data.ingest import Ingest, IngestConfig
from prompt_diffusion.data.records import arrays_table
from prompt_diffusion.data.shard_cache import ShardCache
from prompt_diffusion.data.sources.scenes import ScenesConfig
from prompt_diffusion.store.fingerprint import StageIdentity, StageInput
from prompt_diffusion.store.manifest import ManifestRef, open_manifest
from prompt_diffusion.store.sharded import run_sharded_stage
from prompt_diffusion.store.stage import Context, obtain
from prompt_diffusion.store.storage import check_writable, write_from
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.inputs import TrainInputs
from prompt_diffusion.training.rows import TrainingData, open_training_data
from prompt_diffusion.training.samples import BatchMaker, draw_sample

BATCH_SIZE = 32
CONDITIONS = ("depth", "hed", "seg")
LATENT_SHAPE, TEXT_SHAPE = (4, 32, 32), (77, 768)
BUCKET = "loader"
TURN = {"ours": 2048, "published": 64, "png": 256, "raw": 1024}
"""Samples that each path loads in its turn: about a second."""


def seal_random(stage: str, role: str, of: ManifestRef, store: str, columns: dict[str, tuple[int, ...]]) -> ManifestRef:
    """Seal random arrays of those shapes, one per row of another manifest (per distinct caption, for texts)."""
    manifest = open_manifest(of.uri)
    identity = StageIdentity(
        stage=stage,
        version=1,
        config={},
        inputs=(StageInput(role="base", fingerprint="random"), StageInput.of(role, of)),
    )

    def make_shard(index: int) -> tuple[Any, list[Any]]:
        rng, shard = np.random.default_rng(index), manifest.shards[index]
        rows = shard.rows
        if role == "pairs":
            rows = len(number_captions(manifest.read_shard(shard, ["edited_prompt"])["edited_prompt"].to_pylist()))
        arrays = {name: rng.random((rows, *shape), np.float32) for name, shape in columns.items()}
        return arrays_table({"number": [str(row) for row in range(rows)]}, arrays), []

    return run_sharded_stage(identity, store, len(manifest.shards), make_shard)


def build_inputs(num_groups: int, store: str) -> TrainInputs:
    """Seal ray-cast scenes at 256 px with their maps, and random latents and text embeddings."""
    source = ScenesConfig(num_groups=num_groups, pairs_per_group=2)
    pairs = obtain(
        Ingest(IngestConfig(source=source, image_size=256, shard_rows=32, split_fractions=(1, 0, 0))),
        Context(store, None),
    )
    maps = {
        name: obtain(Annotate(AnnotateConfig(condition=name), pairs), Context(store, AnnotateResources()))
        for name in CONDITIONS
    }
    shapes = {"edited_mean": LATENT_SHAPE, "edited_std": LATENT_SHAPE}
    latents = {
        name: seal_random("encode", "images", ref, store, shapes) for name, ref in {"image": pairs, **maps}.items()
    }
    text = seal_random("encode-text", "pairs", pairs, store, {"embedding": TEXT_SHAPE})
    return TrainInputs(pairs=pairs, maps=maps, latents=latents, text=text)


def move_inputs(inputs: TrainInputs, store: str, target: str) -> TrainInputs:
    """Copy a local store to another one; return the same inputs there."""
    for path in Path(store).rglob("*"):
        if path.is_file():
            write_from(f"{target}/{path.relative_to(store).as_posix()}", path)
    return TrainInputs.model_validate_json(inputs.model_dump_json().replace(f'"{store}/', f'"{target}/'))


class Ours:
    """Our loader on one thread, with one more that fetches shards ahead."""

    def __init__(self, config: TrainConfig, inputs: TrainInputs, cache: Path) -> None:
        self.config, self.inputs, self.cache, self.maker = config, inputs, cache, None
        texts = ("", *(f"{name} map" for name in ("depth", "hed", "segmentation")))
        rng = np.random.default_rng(0)
        self.fixed_texts = {text: rng.random(TEXT_SHAPE, np.float32) for text in texts}
        self.restart()

    def restart(self) -> None:
        """Begin the stream again with an empty cache."""
        self.close()
        shutil.rmtree(self.cache, ignore_errors=True)
        self.data = open_training_data(self.config, self.inputs, ShardCache(self.cache), "train")
        self.maker = BatchMaker(self.config, self.data, self.fixed_texts, 1000)
        self.position = 0

    @property
    def training_data(self) -> TrainingData:
        """What every vision task is read from here."""
        return next(iter(self.data.values()))

    def take(self, count: int) -> None:
        """Make that many more samples."""
        for start in range(self.position, self.position + count, BATCH_SIZE):
            self.maker.make(range(start, min(start + BATCH_SIZE, self.position + count)))
        self.position += count

    def take_first_epoch(self) -> None:
        """Make an epoch with an empty cache."""
        self.restart()
        self.take(self.training_data.rows.num_rows)

    def close(self) -> None:
        """End its thread."""
        if self.maker is not None:
            self.maker.close()


def build_published(ours: Ours, num_samples: int, folder: Path) -> PublishedLoader:
    """Return the published loader on the first samples of our stream."""
    rows = ours.training_data.rows
    images, samples = {}, []
    for index in range(num_samples):
        draw = draw_sample(ours.config, ours.data, index)
        source, target = draw.vision_task.source_condition, draw.vision_task.target_condition
        parts = (
            (draw.example_row, "input", source),
            (draw.example_row, "input", target),
            (draw.row, "edited", source),
            (draw.row, "edited", target),
        )
        images |= {"-".join(map(str, part)): rows.image(*part) for part in parts}
        samples.append([folder / f"{'-'.join(map(str, part))}.jpg" for part in parts])
    write_jpegs(images, folder)
    return PublishedLoader(samples, BATCH_SIZE)


def build_library(ours: Ours, name: str, form: str, num_samples: int, folder: Path) -> LibraryLoader:
    """Return a library's loader on the first samples of our stream; ValueError where its batch is not ours."""
    encode, decode = FORMS[form]
    folder.mkdir()
    records, fixed, labels, keeps = [], {}, {}, {}
    draws = [draw_sample(ours.config, ours.data, index) for index in range(num_samples)]
    for index, draw in enumerate(draws):
        text = draw.vision_task.text if draw.has_text else ""
        if text is not None:
            fixed[index] = ours.fixed_texts[text]
        own = draw.data.read_text(draw.row).tobytes() if text is None else b""
        records.append(build_record(index, draw, own, encode))
        labels[index] = ours.config.vision_tasks.index(draw.vision_task.name)
        keeps[index] = draw.has_example
    LIBRARIES[name].write(records, folder)
    collator = Collator(ours.config, labels, keeps, fixed, decode)
    epochs = LIBRARIES[name].read(folder, BATCH_SIZE)
    record = next(epochs)
    index = int.from_bytes(record["index"], "little")
    batch = collator.make([record], lambda index: draw_sample(ours.config, ours.data, index).generator)
    expected = ours.maker.make(range(index, index + 1))
    for field, value in vars(expected).items():
        found = getattr(batch, field)
        same = all(map(torch.equal, found, value)) if field == "pairs" else np.array_equal(found, value)
        if not same:
            raise ValueError(f"{name} ({form}) gives another {field} of sample {index} than ours")
    return LibraryLoader(epochs, collator, BATCH_SIZE)


def pin_to_one_core() -> None:
    """Keep this process, and every thread that it will start, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@contextmanager
def start_s3(folder: Path) -> Iterator[str | None]:
    """Start a real S3 server and point the AWS variables at it; yield its bucket's URI, None where there is no server."""
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        yield None
        return
    names = ("master.port", "volume.port", "filer.port", "admin.port", "s3.port.grpc", "s3.port")
    names += ("master.port.grpc", "volume.port.grpc", "filer.port.grpc")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = dict(zip(names, (each.getsockname()[1] for each in sockets), strict=True))
    for each in sockets:
        each.close()
    options = [f"-{name}={port}" for name, port in ports.items()]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false", "-master.telemetry=false"]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "loader",
        "AWS_SECRET_ACCESS_KEY": "loader-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    place = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}", f"-dir={folder}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([program, "-logtostderr=true", "mini", *place, *options], stdout=log, stderr=log)
    try:
        yield f"s3://{BUCKET}"
    finally:
        server.terminate()
        server.wait()


def wait_for(bucket: str) -> None:
    """Wait until the bucket takes a write; ValueError says why it does not after a minute."""
    give_up = time.monotonic() + 60
    while True:
        try:
            check_writable(bucket)
        except ValueError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)
        else:
            return


def compare_rates(ours: list[float], peer: list[float]) -> dict[str, Any]:
    """Return the peer's median rate, and how many times faster ours is: the median over the rounds and its spread."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "samples_a_second": round(statistics.median(peer), 1),
        "ratio": round(statistics.median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def build_peers(ours: Ours, num_records: int, root: Path) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Return the loaders of the published way and of the libraries, the bytes of each on disk, and which are absent."""
    loaders: dict[str, Any] = {"published": build_published(ours, TURN["published"], root / "jpegs")}
    sizes = {"published": count_bytes(root / "jpegs") // len(list((root / "jpegs").iterdir()))}
    for name, library in LIBRARIES.items():
        for form in FORMS if library.is_installed else ():
            folder = root / f"{name}-{form}"
            loaders[f"{name}, {form}"] = build_library(ours, name, form, num_records, folder)
            sizes[f"{name}, {form}"] = count_bytes(folder) // num_records
    return loaders, sizes, [name for name, library in LIBRARIES.items() if not library.is_installed]


def measure(arguments: argparse.Namespace, root: Path, bucket: str | None) -> dict[str, Any]:
    """Build everything, measure in turns, and return the result."""
    store = str(root / "store")
    inputs = build_inputs(arguments.groups, store)
    config = TrainConfig()
    ours = Ours(config, inputs, root / "cache")
    num_rows = ours.training_data.rows.num_rows
    ours.take(num_rows)
    loaders, sizes, absent = build_peers(ours, arguments.records, root)
    cold = Ours(config, inputs, root / "cold-cache")
    paths = {"ours": lambda: ours.take(TURN["ours"])}
    counts = {"ours": TURN["ours"], "first epoch": num_rows}
    for name, loader in loaders.items():
        counts[name] = TURN[name.rpartition(" ")[2]]
        paths[name] = lambda loader=loader, count=counts[name]: loader.take(count)
    paths["first epoch"] = cold.take_first_epoch
    if bucket is not None:
        wait_for(bucket)
        remote = Ours(config, move_inputs(inputs, store, bucket), root / "s3-cache")
        counts |= {"first epoch from S3": num_rows, "from S3": TURN["ours"]}
        paths |= {"first epoch from S3": remote.take_first_epoch, "from S3": lambda: remote.take(TURN["ours"])}
    seconds = take_turns(arguments.rounds, paths)
    rates = {name: [counts[name] / each for each in rounds] for name, rounds in seconds.items()}
    table = {name: compare_rates(rates["ours"], rates[name]) for name in paths if name != "ours"}
    libraries = {name: row for name, row in table.items() if name.partition(",")[0] in LIBRARIES}
    rows = {name: size * (len(config.vision_tasks) if name in libraries else 8) for name, size in sizes.items()}
    rows |= {"ours, store": count_bytes(root / "store") // num_rows, "ours, cache": count_bytes(ours.cache) // num_rows}
    published = table.pop("published")
    return {
        "name": "loader",
        "ratio": published["ratio"],
        "ours": round(statistics.median(rates["ours"]), 1),
        "peer": published["samples_a_second"],
        "unit": "samples/s on one core; ours warm, the peer as published",
        "spread": published["spread"],
        "device": describe_device(),
        "versions": find_versions("torch", "numpy", "pillow", *(name for name in LIBRARIES if name not in absent)),
        "libraries": libraries,
        "absent_libraries": absent,
        "ratio_to_the_best_library_png": _find_best(libraries, "png"),
        "ratio_to_the_best_library_raw": _find_best(libraries, "raw"),
        "ours_elsewhere": {name: row for name, row in table.items() if name not in libraries},
        "first_epoch_ratio_to_published": compare_rates(rates["first epoch"], rates["published"])["ratio"],
        "share_of_local_from_s3": round(1 / table["from S3"]["ratio"], 2) if bucket is not None else None,
        "bytes_on_disk_a_row_for_all_six_vision_tasks": rows,
    }


def _find_best(libraries: dict[str, Any], form: str) -> float | None:
    """Return how many times faster ours is than the fastest library that is fed that form."""
    return min((row["ratio"] for name, row in libraries.items() if name.endswith(form)), default=None)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=64, help="prompt groups of two pairs each")
    parser.add_argument("--records", type=int, default=512, help="samples that the libraries are fed")
    parser.add_argument("--rounds", type=int, default=5)
    add_out_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        (Path(folder) / "s3").mkdir()
        with start_s3(Path(folder) / "s3") as bucket:
            pin_to_one_core()
            result = measure(arguments, Path(folder), bucket)
    finish(result, arguments.out)


if __name__ == "__main__":
    main()
