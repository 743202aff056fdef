"""Image files in, map files out, in order: decoding, inference and encoding overlap, in memory bounded by the batch.

Worker threads decode the next images and encode the last maps while one thread keeps the device busy, so that no GPU
waits for a PNG. Pillow, OpenCV and torch leave Python's lock while they work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Self

import numpy as np

from prompt_diffusion.annotators.base import AnnotateResources, Annotator, ImageBatch
from prompt_diffusion.annotators.bounds import BoundedAnnotator
from prompt_diffusion.data.transforms import decode_image, encode_png, resize_image
from prompt_diffusion.store.concurrency import map_ahead

_BATCHES_AHEAD = 2  # one on the device, one waiting for it


class MapMaker:
    """An annotator behind threads that feed it and take from it; several streams may share it."""

    def __init__(
        self, annotator: Annotator, batch_size: int, workers: ThreadPoolExecutor, device: ThreadPoolExecutor
    ) -> None:
        """Take the annotator and the pools: ``workers`` for pixels in and out, ``device`` of one thread for inference."""
        self.annotator, self.batch_size = annotator, batch_size
        self._workers, self._device = workers, device

    @classmethod
    @contextmanager
    def open(cls, load: Callable[[], Annotator], resources: AnnotateResources) -> Iterator[Self]:
        """Load the annotator in the thread that will use it, and end the threads with the block."""
        workers = ThreadPoolExecutor(resources.num_workers, "pixels")
        device = ThreadPoolExecutor(1, "device", _limit_threads, (resources.num_threads,))
        try:
            yield cls(device.submit(load).result(), resources.batch_size, workers, device)
        finally:
            # After an error or an interrupt, streams of other threads end with the batch that is on the device.
            for pool in (workers, device):
                pool.shutdown(cancel_futures=True)

    def make_maps(self, files: Iterable[bytes], size: int | None = None) -> Iterator[bytes]:
        """Yield the map of each image file as PNG, in order.

        With ``size``, an image is cut to its centre square, annotated at its own resolution, and its map resized once, by
        Lanczos, to (size, size, 3). ValueError, in one sentence, for a file that is no image.
        """

        def decode(file: bytes) -> tuple[ImageBatch, tuple[int, int]]:
            image = decode_image(file)
            image = image if size is None else resize_image(image, min(image.shape[:2]))
            return self._shrink(image), image.shape[:2]

        def encode(item: tuple[ImageBatch, tuple[int, int]]) -> bytes:
            map_, shape = item
            return encode_png(self._enlarge(map_, shape) if size is None else resize_image(map_, size))

        shapes: deque[tuple[int, int]] = deque()

        def list_images() -> Iterator[ImageBatch]:
            for image, shape in map_ahead(self._workers, decode, files, _BATCHES_AHEAD * self.batch_size):
                shapes.append(shape)
                yield image

        maps = ((map_, shapes.popleft()) for map_ in self.annotate(list_images()))
        return map_ahead(self._workers, encode, maps, _BATCHES_AHEAD * self.batch_size)

    def _shrink(self, image: ImageBatch) -> ImageBatch:
        """Return what the annotator sees of an image: shrunk here, by many threads, so that no large one waits in memory."""
        if not isinstance(self.annotator, BoundedAnnotator):
            return image
        self.annotator.warn(*image.shape[:2])
        return self.annotator.shrink(image)

    def _enlarge(self, map_: ImageBatch, shape: tuple[int, int]) -> ImageBatch:
        return self.annotator.enlarge(map_, *shape) if isinstance(self.annotator, BoundedAnnotator) else map_

    def annotate(self, images: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """Yield the map H,W,3 of each image H,W,3, in order; a batch holds images of one shape, at most ``batch_size``."""
        for maps in map_ahead(self._device, self._annotate_batch, self._stack(images), _BATCHES_AHEAD):
            yield from maps

    def _stack(self, images: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        for _, same_shape in groupby(images, key=lambda image: image.shape):
            while batch := [image for _, image in zip(range(self.batch_size), same_shape, strict=False)]:
                yield np.stack(batch)

    def _annotate_batch(self, batch: ImageBatch) -> ImageBatch:
        maps = self.annotator.annotate(batch)
        assert maps.shape == batch.shape, f"{self.annotator.name} made maps {maps.shape} of images {batch.shape}"
        return maps


def _limit_threads(num_threads: int | None) -> None:
    """Limit torch's threads in the thread that computes: each thread has its own limit."""
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
