"""From an image set to batches of views, made in threads beside the training step."""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sslzoo.data.images import ImageSet
from sslzoo.errors import UserError
from sslzoo.method import Batch
from sslzoo.views import Clean, Views

T = TypeVar("T")


class NamedImages(Protocol):
    """A set: so many images, and what it is called."""

    name: str

    def __len__(self) -> int: ...


def default_workers() -> int:
    """Threads that make views: half the cores, since torch's own threads want the rest."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // 2))


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of ``size`` images in one epoch, ``(size,)`` int64; a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def batch_rows(position: int, size: int, batch_size: int, seed: int, rank: int, world: int) -> np.ndarray:
    """One rank's rows of batch ``position`` of a run, ``(B,)``.

    Every epoch's order is cut into global batches, of which rank r takes its r-th part; a last one that is not full is
    dropped.
    """
    epoch, step = divmod(position, size // batch_size)
    share = batch_size // world
    start = step * batch_size + rank * share
    return epoch_order(seed, epoch, size)[start : start + share]


def first_readable(
    read: Callable[[int], T], row: int, images: NamedImages, on_error: str, skipped: set[int]
) -> tuple[T, int]:
    """What ``read`` makes of ``row``, or under ``on_error=skip`` of the next row that can be read, and which row it is.

    Rows that cannot be read are added to ``skipped``.

    Raises:
        UserError: under ``on_error=raise`` that of ``read``; under ``skip`` if no row can be read.
    """
    for candidate in range(row, row + len(images)):
        candidate %= len(images)
        try:
            return read(candidate), candidate
        except UserError:
            if on_error == "raise":
                raise
            skipped.add(candidate)
    raise UserError(f"no image of {images.name} can be read")


class Reader:
    """Reads rows of an image set, in threads where they lie on disk.

    Args:
        images: the set.
        pool: threads that decode.
        on_error: ``raise`` stops at a corrupt image; ``skip`` takes the next readable row in its place.

    Attributes:
        skipped: rows that could not be read.
    """

    def __init__(self, images: ImageSet, pool: ThreadPoolExecutor, on_error: str = "raise"):
        self.images, self.pool, self.on_error = images, pool, on_error
        self.skipped: set[int] = set()

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray | list[np.ndarray], np.ndarray]:
        """Images of ``rows``, stacked or as a list, and the rows that were really read, ``(B,)`` int64."""
        if self.images.images is not None:
            return self.images.images[rows], rows
        read = list(self.pool.map(self._read, rows.tolist()))
        return [image for image, _ in read], np.array([row for _, row in read])

    def _read(self, row: int) -> tuple[np.ndarray, int]:
        return first_readable(self.images.read, row, self.images, self.on_error, self.skipped)


class Loader:
    """Batches of views for one rank, ready before they are asked for.

    The global batch of every step is cut from the epoch's order, a pure function of (seed, epoch), and rank r takes
    its r-th part: W ranks of B images see what one rank of W * B sees. A last batch that is not full is dropped.

    The views of a batch are overwritten once the next batch is taken.

    Args:
        images: the training set.
        views: what happens to an image.
        batch_size: images per step over all ranks.
        seed: of the order.
        workers: threads.
        rank, world: this process's place.
        on_error: see ``Reader``.
        pin: page-lock the buffers, for copies to a GPU.

    Attributes:
        position: batches given out since the run began; lives in the checkpoint.
    """

    AHEAD = 2  # batches made in advance

    def __init__(
        self,
        images: ImageSet,
        views: Views,
        batch_size: int,
        seed: int = 0,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        on_error: str = "raise",
        pin: bool = False,
    ):
        if batch_size % world:
            raise UserError(f"data.batch_size={batch_size} does not split evenly over {world} devices")
        self.images, self.views, self.seed = images, views, seed
        self.batch_size, self.rank, self.world = batch_size, rank, world
        workers = workers or default_workers()
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="views")
        self.reader = Reader(images, self.pool, on_error)
        self.pin = pin
        self.position = 0

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def rows(self, position: int) -> np.ndarray:
        """This rank's rows of batch ``position``, ``(B,)``."""
        return batch_rows(position, len(self.images), self.batch_size, self.seed, self.rank, self.world)

    def make(self, position: int, out: list[Tensor]) -> Batch:
        """Batch ``position``, its views written to ``out``."""
        images, rows = self.reader(self.rows(position))
        views = self.views(images, rows, position // len(self), out=out, pool=self.pool)
        return Batch(views, torch.from_numpy(rows), torch.from_numpy(self.images.labels[rows]))

    def __iter__(self) -> Iterator[Batch]:
        """From ``position`` to the end of its epoch."""
        end = (self.position // len(self) + 1) * len(self)
        ready: queue.Queue = queue.Queue()
        free: queue.Queue = queue.Queue()  # buffers to write to, one of them in the training step's hands
        for _ in range(self.AHEAD + 1):
            free.put((self.views.buffers(self.batch_size // self.world, pin=self.pin), None))
        stop = threading.Event()

        def produce(start: int) -> None:
            try:
                for position in range(start, end):
                    buffers, copied = free.get()
                    if copied is not None:
                        copied.synchronize()  # the GPU has read these buffers
                    if stop.is_set():
                        return
                    ready.put((self.make(position, buffers), buffers))
            except BaseException as error:  # handed to the training thread, which raises it
                ready.put((error, None))

        producer = threading.Thread(target=produce, args=(self.position,), name="views-producer", daemon=True)
        producer.start()
        try:
            for _ in range(self.position, end):
                batch, buffers = ready.get()
                if isinstance(batch, BaseException):
                    raise batch
                self.position += 1
                yield batch
                free.put((buffers, _event() if self.pin else None))
        finally:
            stop.set()
            free.put((None, None))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def clean_batches(
    images: ImageSet, clean: Clean, batch_size: int = 512, rows: Sequence[int] | None = None, on_error: str = "raise"
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Views for evaluation, in the set's order: yields ``(b, 3, S, S)`` and the rows read, ``(b,)``.

    Corrupt images are left out under ``on_error=skip``.
    """
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    with ThreadPoolExecutor(default_workers()) as pool:
        reader = Reader(images, pool, on_error)
        for part in np.array_split(rows, range(batch_size, len(rows), batch_size)):
            read, found = reader(part)
            kept = found == part
            if not kept.all():
                read, found = [image for image, keep in zip(read, kept, strict=True) if keep], found[kept]
            if len(found):
                yield clean(read, found, 0, pool=pool), found


class Images(pl.LightningDataModule):
    """Training batches for a method, and the sets that monitors look at.

    Args:
        train: training images.
        val: held-out images, or None.
        views: augmentation.
        clean: the view without augmentation.
        batch_size: images per forward pass over all ranks.
        seed, workers, on_error: see ``Loader``.
    """

    def __init__(
        self,
        train: ImageSet,
        val: ImageSet | None,
        views: Views,
        clean: Clean,
        batch_size: int,
        seed: int = 0,
        workers: int | None = None,
        on_error: str = "raise",
    ):
        super().__init__()
        if on_error not in ("raise", "skip"):
            raise UserError(f"data.on_error={on_error} is neither raise nor skip")
        self.train, self.val, self.views, self.clean = train, val, views, clean
        self.batch_size, self.seed, self.workers, self.on_error = batch_size, seed, workers, on_error
        self.position = 0
        self.loader: Loader | None = None

    @property
    def skipped(self) -> list[Path]:
        """Pictures that this process could not read."""
        return sorted({Path(self.train.files[row]) for row in self.loader.reader.skipped}) if self.loader else []

    def state_dict(self) -> dict:
        """Where the run stands in the data; Lightning restores a loader's own state in the middle of an epoch only."""
        return {"position": self.loader.position if self.loader else self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def train_dataloader(self) -> Loader:
        self.loader = Loader(
            self.train,
            self.views,
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            on_error=self.on_error,
            pin=self.trainer.strategy.root_device.type == "cuda",
        )
        self.loader.position = self.position
        return self.loader
