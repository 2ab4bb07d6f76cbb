"""From a set with boxes to batches for a detector, decoded and augmented in threads beside the training step."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sslzoo.data.box_set import BoxSet
from sslzoo.data.box_views import STRENGTHS, augmented, mirrored, twins
from sslzoo.data.module import batch_rows, default_workers, first_readable
from sslzoo.errors import UserError
from sslzoo.views.draw import key

AUGMENTS = (*STRENGTHS, "flip")

Example = Callable[[int, int], tuple[Tensor, dict[str, Tensor]]]  # from row and epoch to an image and its target


class Pictures(Protocol):
    """N examples, each from a picture file.

    Attributes:
        name: of the set.
        files: the picture of each example.
    """

    name: str
    files: Sequence[Path]

    def __len__(self) -> int: ...


class BoxBatch(NamedTuple):
    """One step's input on one rank.

    Attributes:
        images: B tensors ``(3, H, W)`` uint8, each of its own size.
        targets: B dictionaries, by name, e.g. ``boxes`` (n, 4) float32 and ``labels`` (n,) int64.
        index: ``(B,)`` int64, position in the training set.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    index: Tensor


def box_example(
    images: BoxSet, augment: str, size: int, seed: int = 0, wanted: Sequence[str] = ("boxes", "labels")
) -> Example:
    """What an image of a set with boxes looks like in an epoch: a function of (seed, epoch, row).

    Args:
        images: the set.
        augment: one of ``box_views.STRENGTHS``; or ``flip``, which leaves images as large as they are.
        size: side of the views in pixels, but for ``flip``.
        seed: of all draws.
        wanted: names in the target, ``boxes``, ``labels``, ``masks``, ``keypoints`` or others of ``BoxSet.target``.

    Raises:
        UserError: on an unknown augmentation, or a set without boxes, or without keypoints where they are wanted.
    """
    if augment not in AUGMENTS:
        raise UserError(f"task.augment={augment} is none of {', '.join(AUGMENTS)}")
    if not len(images.labels):
        raise UserError(f"the training images of {images.name} have no boxes; choose data that has some")
    masks, points = "masks" in wanted, "keypoints" in wanted
    if points and images.keypoints is None:
        raise UserError(f"data={images.name} has no keypoints; train on boxes or masks, or take another set")

    def example(row: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = images.read(row, with_masks=masks, with_keypoints=points)
        draw = key(seed, epoch, row)
        if augment == "flip":
            pixels, target = mirrored(image, target, draw, images.swap)
        else:
            pixels, target = augmented(image, target, augment, size, draw, images.swap)
        return pixels, {name: target[name] for name in wanted}

    return example


def twin_example(images: BoxSet, augment: str, size: int, seed: int = 0) -> Example:
    """An image as a teacher and as its student see it, in the same pixels; boxes of the set are not looked at.

    The image is the student's: after ``box_views.twins``, or with ``flip`` in a mirror only. The target holds the
    teacher's alone, ``clean``, as large. Both are a function of (seed, epoch, row).

    Args:
        images, augment, size, seed: see ``box_example``.

    Raises:
        UserError: on an unknown augmentation.
    """
    if augment not in AUGMENTS:
        raise UserError(f"task.augment={augment} is none of {', '.join(AUGMENTS)}")

    def example(row: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, draw = images.picture(row), key(seed, epoch, row)
        if augment == "flip":
            clean = distorted = mirrored(image, {"boxes": torch.zeros(0, 4)}, draw)[0]
        else:
            clean, distorted, _ = twins(image, augment, size, draw)
        return distorted, {"clean": clean}

    return example


class BoxLoader:
    """Batches for one rank, made ahead of the step that takes them.

    As in ``sslzoo.data.module.Loader`` the global batch of every step is cut from the epoch's order, of which rank r
    takes its r-th part.

    Args:
        images: the training set.
        example: from a row of it and the epoch to an image ``(3, H, W)`` uint8 and its target; from any thread.
        batch_size: images per step over all ranks.
        seed: of the order.
        workers: threads.
        rank, world: this process's place.
        on_error: ``raise`` stops at a damaged picture; ``skip`` takes the next readable row in its place.

    Attributes:
        position: batches given out since the run began; lives in the checkpoint.
        skipped: rows that could not be read.
    """

    AHEAD = 2  # batches made in advance

    def __init__(
        self,
        images: Pictures,
        example: Example,
        batch_size: int,
        seed: int = 0,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        on_error: str = "raise",
    ):
        if batch_size % world:
            raise UserError(f"data.batch_size={batch_size} does not split evenly over {world} devices")
        self.images, self.example, self.on_error = images, example, on_error
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.pool = ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="boxes")
        self.position = 0
        self.skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def rows(self, position: int) -> np.ndarray:
        """This rank's rows of batch ``position``, ``(B,)``."""
        return batch_rows(position, len(self.images), self.batch_size, self.seed, self.rank, self.world)

    def _read(self, row: int, epoch: int) -> tuple[tuple[Tensor, dict[str, Tensor]], int]:
        """The example of ``row``, or of the next that can be read, and the row that it is of."""

        def read(row: int) -> tuple[Tensor, dict[str, Tensor]]:
            return self.example(row, epoch)

        return first_readable(read, row, self.images, self.on_error, self.skipped)

    def __iter__(self) -> Iterator[BoxBatch]:
        """From ``position`` to the end of its epoch."""
        epoch = self.position // len(self)
        ahead: deque[list[Future]] = deque()

        def asked() -> Iterator[None]:
            for position in range(self.position, (epoch + 1) * len(self)):
                ahead.append([self.pool.submit(self._read, row, epoch) for row in self.rows(position).tolist()])
                yield

        requests = asked()
        try:
            for _ in islice(requests, self.AHEAD):
                pass
            while ahead:
                next(requests, None)
                examples, rows = zip(*(each.result() for each in ahead.popleft()), strict=True)
                images, targets = zip(*examples, strict=True)
                self.position += 1
                yield BoxBatch(list(images), list(targets), torch.tensor(rows))
        finally:
            for examples in ahead:
                for each in examples:
                    each.cancel()


def clean_pictures(images: BoxSet, rows: np.ndarray) -> Iterator[Tensor]:
    """Images as they are, ``(3, H, W)`` uint8, in the order of ``rows``, a few of them read ahead."""
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(default_workers()) as pool:
        for row in rows.tolist():
            ahead.append(pool.submit(images.picture, row))
            if len(ahead) > 32:
                yield _chw(ahead.popleft().result())
        while ahead:
            yield _chw(ahead.popleft().result())


def _chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class Boxes(pl.LightningDataModule):
    """Training batches of examples that a function makes, and the set that what is learned is scored on.

    Args:
        train: training images.
        val: held-out images.
        example: see ``BoxLoader``; for instance ``box_example(train, ...)``.
        batch_size, seed, workers, on_error: see ``BoxLoader``.

    Raises:
        UserError: on a batch larger than the set.
    """

    def __init__(
        self,
        train: Pictures,
        val: Pictures,
        example: Example,
        batch_size: int,
        seed: int = 0,
        workers: int | None = None,
        on_error: str = "raise",
    ):
        super().__init__()
        if not 0 < batch_size <= len(train):
            raise UserError(
                f"data.batch_size={batch_size} is more than the {len(train)} training images of {train.name};"
                f" set data.batch_size to at most {len(train)}"
            )
        self.train, self.val, self.example, self.batch_size = train, val, example, batch_size
        self.seed, self.workers, self.on_error = seed, workers, on_error
        self.position = 0
        self.loader: BoxLoader | None = None

    @property
    def skipped(self) -> list[Path]:
        """Pictures that this process could not read."""
        return sorted({Path(self.train.files[row]) for row in self.loader.skipped}) if self.loader else []

    def state_dict(self) -> dict:
        """Where the run stands in the data; Lightning restores a loader's own state in the middle of an epoch only."""
        return {"position": self.loader.position if self.loader else self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def train_dataloader(self) -> BoxLoader:
        self.loader = BoxLoader(
            self.train,
            self.example,
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            on_error=self.on_error,
        )
        self.loader.position = self.position
        return self.loader
