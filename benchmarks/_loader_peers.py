"""The loaders that ours is measured against: the published one, and three libraries fed one record a finished sample.

The libraries read records in the order that they can give (a shuffled stream), and find everything of a sample in one place:
its example pair was chosen, and its images were gathered, when the records were written. That is the best case for them. To
draw another example or vision task in the next epoch, as the recipe asks, a record would have to hold every image of its row,
and a second record would have to be read for an example of another row.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from prompt_diffusion.data.sampler import sample_generator
from prompt_diffusion.data.transforms import Pixels, decode_image, encode_png
from prompt_diffusion.engine.noise import draw_timestep
from prompt_diffusion.image_files import open_image
from prompt_diffusion.training.config import TrainConfig
from prompt_diffusion.training.samples import InContextBatch, SampleDraw

Record = Mapping[str, bytes]
IMAGES = ("example_source", "example_target", "query")
FIELDS = ("index", *IMAGES, "mean", "std", "text")
_SHARD_BYTES = 1 << 26
_SHUFFLE_RECORDS = 256


def write_jpegs(images: Mapping[str, Pixels], folder: Path) -> None:
    """Write images, doubled to 512 px, as the JPEG files that the published loader opens (Pillow's usual quality)."""
    folder.mkdir()
    for name, image in images.items():
        Image.fromarray(image).resize((512, 512), Image.Resampling.LANCZOS).save(folder / f"{name}.jpg")


class PublishedLoader:
    """Per sample four JPEGs: opened, made RGB, resized by Lanczos to 256 px, in float32 [-1, 1]; then stacked."""

    def __init__(self, samples: Sequence[Sequence[Path]], batch_size: int) -> None:
        """Take the files of each sample: example source and target, query, target."""
        self.batch_size, self._stream = batch_size, itertools.cycle(samples)

    def take(self, count: int) -> torch.Tensor:
        """Load that many samples; return the last batch: N, 4, H, W, 3."""
        for _ in range(0, count, self.batch_size):
            samples = [
                np.stack([_open_jpeg(path) for path in paths])
                for paths in itertools.islice(self._stream, self.batch_size)
            ]
            batch = torch.from_numpy(np.stack(samples))
        return batch


def _open_jpeg(path: Path) -> np.ndarray:
    with open_image(path.read_bytes()) as image:
        resized = image.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
    return np.asarray(resized).astype(np.float32) / 127.5 - 1.0


def build_record(index: int, draw: SampleDraw, text: bytes, encode: Callable[[Pixels], bytes]) -> Record:
    """Return everything that a sample is made of; ``text`` is empty where the embedding is one of the few fixed ones."""
    mean, std = draw.data.read_posterior(draw.vision_task.target_condition, draw.row)
    images = (draw.read_example_source(), draw.read_example_target(), draw.read_query())
    contents = (index.to_bytes(8, "little"), *map(encode, images), mean.tobytes(), std.tobytes(), text)
    return dict(zip(FIELDS, contents, strict=True))


def encode_raw(image: Pixels) -> bytes:
    """Return the pixels themselves, of a grey image one channel."""
    is_grey = bool((image[..., :1] == image).all())
    return image[..., 0].tobytes() if is_grey else image.tobytes()


def decode_raw(data: bytes) -> Pixels:
    """Return what ``encode_raw`` was given, a grey image with one channel."""
    return np.frombuffer(data, np.uint8).reshape(256, 256, -1)


FORMS: dict[str, tuple[Callable[[Pixels], bytes], Callable[[bytes], Pixels]]] = {
    "png": (encode_png, decode_image),
    "raw": (encode_raw, decode_raw),
}
"""How a record holds its images: as every library recommends, and as nothing but pixels, so that none has to decode."""


@dataclass(frozen=True)
class Collator:
    """Makes of records what ours makes: the whole micro-batch, posterior samples and noise included."""

    config: TrainConfig
    labels: Mapping[int, int]
    keeps_example: Mapping[int, bool]
    fixed_texts: Mapping[int, np.ndarray]
    """Text embeddings of the samples without one of their own, by index."""
    decode: Callable[[bytes], Pixels]

    def make(self, records: Sequence[Record], find_generator: Callable[[int], np.random.Generator]) -> InContextBatch:
        """Return the micro-batch of some records, each with the randomness of its index."""
        size, latents, texts = (len(records), 256, 256, 3), (len(records), 4, 32, 32), (len(records), 77, 768)
        images = {name: torch.empty(size, dtype=torch.uint8) for name in IMAGES}
        clean, noise, text = torch.empty(latents), torch.empty(latents), torch.empty(texts)
        indices = [int.from_bytes(record["index"], "little") for record in records]
        timesteps = []
        for slot, (index, record) in enumerate(zip(indices, records, strict=True)):
            for name in IMAGES:
                _fill(images[name].numpy()[slot], self.decode(record[name]))
            generator = find_generator(index)
            timesteps.append(draw_timestep(generator, self.config.noise, 1000))
            mean, std = (np.frombuffer(record[name], np.float32).reshape(4, 32, 32) for name in ("mean", "std"))
            draw = generator.standard_normal(mean.shape, dtype=np.float32)
            np.add(mean, std * draw, out=clean.numpy()[slot])
            generator.standard_normal(mean.shape, dtype=np.float32, out=noise.numpy()[slot])
            own = record["text"]
            embedding = np.frombuffer(own, np.float32).reshape(77, 768) if own else self.fixed_texts[index]
            text.numpy()[slot] = embedding
        return InContextBatch(
            labels=[self.labels[index] for index in indices],
            example_pairs=(images["example_source"], images["example_target"]),
            has_example=torch.tensor([self.keeps_example[index] for index in indices]),
            queries=images["query"],
            clean=clean,
            noise=noise,
            timesteps=torch.tensor(timesteps),
            text=text,
        )


def _fill(slot: Pixels, pixels: Pixels) -> None:
    if pixels.shape[2] == 1:
        cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB, dst=slot)
    else:
        slot[...] = pixels


class LibraryLoader:
    """Micro-batches of the records that a library streams."""

    def __init__(self, epochs: Iterator[Record], collator: Collator, batch_size: int) -> None:
        self.collator, self.batch_size, self._stream, self._taken = collator, batch_size, epochs, 0

    def take(self, count: int) -> InContextBatch:
        """Load that many samples; return the last batch."""
        for _ in range(0, count, self.batch_size):
            records = list(itertools.islice(self._stream, self.batch_size))
            batch = self.collator.make(records, self._next_generator)
        return batch

    def _next_generator(self, index: int) -> np.random.Generator:
        self._taken += 1  # another noise in every epoch
        return sample_generator(self._taken, index)


def _write_webdataset(records: Sequence[Record], folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxsize=_SHARD_BYTES, verbose=0) as writer:
        for number, record in enumerate(records):
            writer.write({"__key__": f"{number:08d}", **{f"{name}.bin": data for name, data in record.items()}})


def _read_webdataset(folder: Path, batch_size: int) -> Iterator[Record]:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    stream = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(_SHUFFLE_RECORDS)
    while True:
        for sample in stream:
            yield {name: sample[f"{name}.bin"] for name in FIELDS}


def _write_litdata(records: Sequence[Record], folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes=_SHARD_BYTES)
    for number, record in enumerate(records):
        cache[number] = dict(record)
    cache.done()
    cache.merge()


def _read_litdata(folder: Path, batch_size: int) -> Iterator[Record]:
    import litdata

    dataset = litdata.StreamingDataset(str(folder), shuffle=True)
    while True:
        yield from dataset


def _write_mosaic(records: Sequence[Record], folder: Path) -> None:
    import streaming

    columns = dict.fromkeys(FIELDS, "bytes")
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=_SHARD_BYTES) as writer:
        for record in records:
            writer.write(dict(record))


def _read_mosaic(folder: Path, batch_size: int) -> Iterator[Record]:
    import streaming

    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    while True:
        yield from dataset


@dataclass(frozen=True)
class Library:
    """A library that streams records."""

    module: str
    write: Callable[[Sequence[Record], Path], None]
    read: Callable[[Path, int], Iterator[Record]]
    """Gives the records again and again, each epoch in another order."""

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported here."""
        return importlib.util.find_spec(self.module) is not None


LIBRARIES = {
    "webdataset": Library("webdataset", _write_webdataset, _read_webdataset),
    "litdata": Library("litdata", _write_litdata, _read_litdata),
    "mosaicml-streaming": Library("streaming", _write_mosaic, _read_mosaic),
}


def count_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
