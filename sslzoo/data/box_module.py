"""From a set with boxes to batches for a detector, decoded and augmented in threads beside the training step."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sslzoo.data.box_set import BoxSet
from sslzoo.data.box_views import STRENGTHS, augmented
from sslzoo.data.module import default_workers, epoch_order
from sslzoo.errors import UserError
from sslzoo.views.draw import key

AUGMENTS = (*STRENGTHS, "flip")


class BoxBatch(NamedTuple):
    """One step's input on one rank.

    Attributes:
        images: B tensors ``(3, H, W)`` uint8, each of its own size.
        targets: B dictionaries: ``boxes`` (n, 4) float32, ``labels`` (n,) int64 and, on request, ``masks`` (n, H, W).
        index: ``(B,)`` int64, position in the training set.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    index: Tensor


class BoxLoader:
    """Batches for one rank, made ahead of the step that takes them.

    As in ``sslzoo.data.module.Loader`` the global batch of every step is cut from the epoch's order, of which rank r
    takes its r-th part, and what happens to image i in epoch e is a function of (seed, e, i).

    Args:
        images: the training set.
        augment: ``s1`` to ``s4``, see ``box_views.augmented``; or ``flip``, which leaves images as large as they are.
        size: side of the views of ``s1`` to ``s4`` in pixels.
        batch_size: images per step over all ranks.
        seed: of order and augmentation.
        workers: threads.
        rank, world: this process's place.
        masks: whether targets have masks.

    Attributes:
        position: batches given out since the run began; lives in the checkpoint.
    """

    AHEAD = 2  # batches made in advance

    def __init__(
        self,
        images: BoxSet,
        augment: str,
        size: int,
        batch_size: int,
        seed: int = 0,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        masks: bool = False,
    ):
        if batch_size % world:
            raise UserError(f"data.batch_size={batch_size} does not split evenly over {world} devices")
        self.images, self.augment, self.size = images, augment, size
        self.batch_size, self.seed, self.rank, self.world, self.masks = batch_size, seed, rank, world, masks
        self.pool = ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="boxes")
        self.position = 0

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def rows(self, position: int) -> np.ndarray:
        """This rank's rows of batch ``position``, ``(B,)``."""
        epoch, step = divmod(position, len(self))
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        return epoch_order(self.seed, epoch, len(self.images))[start : start + share]

    def example(self, row: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image ``row`` as it looks in ``epoch``, ``(3, H, W)`` uint8, and what there is to learn in it."""
        image, target = self.images.read(row, with_masks=self.masks)
        draw = key(self.seed, epoch, row)
        if self.augment == "flip":
            pixels, target = mirrored(_chw(image), target, draw)
        else:
            pixels, target = augmented(image, target, self.augment, self.size, draw)
        names = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
        return pixels, {name: target[name] for name in names}

    def __iter__(self) -> Iterator[BoxBatch]:
        """From ``position`` to the end of its epoch."""
        epoch = self.position // len(self)
        ahead: deque[tuple[np.ndarray, list[Future]]] = deque()

        def asked() -> Iterator[None]:
            for position in range(self.position, (epoch + 1) * len(self)):
                rows = self.rows(position)
                ahead.append((rows, [self.pool.submit(self.example, row, epoch) for row in rows.tolist()]))
                yield

        requests = asked()
        try:
            for _ in islice(requests, self.AHEAD):
                pass
            while ahead:
                next(requests, None)
                rows, examples = ahead.popleft()
                images, targets = zip(*(each.result() for each in examples), strict=True)
                self.position += 1
                yield BoxBatch(list(images), list(targets), torch.from_numpy(rows))
        finally:
            for _, examples in ahead:
                for each in examples:
                    each.cancel()


def mirrored(pixels: Tensor, target: dict, draw: int) -> tuple[Tensor, dict]:
    """An image ``(3, H, W)`` and its target, or both in a mirror; crowds are left out."""
    kept = ~target["iscrowd"]
    target = {name: value[kept] if isinstance(value, Tensor) else value for name, value in target.items()}
    if np.random.default_rng(draw).random() < 0.5:
        return pixels, target
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = pixels.shape[2] - target["boxes"][:, [2, 0]]
    target["boxes"] = boxes
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return pixels.flip(-1), target


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
    """Training batches for a detector, and the set it is scored on.

    Args:
        train: training images.
        val: held-out images.
        augment, size, batch_size, seed, workers, masks: see ``BoxLoader``.

    Raises:
        UserError: on a batch larger than the set, a set without boxes, or an unknown augmentation.
    """

    def __init__(
        self,
        train: BoxSet,
        val: BoxSet,
        augment: str,
        size: int,
        batch_size: int,
        seed: int = 0,
        workers: int | None = None,
        masks: bool = False,
    ):
        super().__init__()
        if not 0 < batch_size <= len(train):
            raise UserError(
                f"data.batch_size={batch_size} is more than the {len(train)} training images of {train.name};"
                f" set data.batch_size to at most {len(train)}"
            )
        if not len(train.labels):
            raise UserError(f"the training images of {train.name} have no boxes; choose data that has some")
        if augment not in AUGMENTS:
            raise UserError(f"task.augment={augment} is none of {', '.join(AUGMENTS)}")
        self.train, self.val, self.augment, self.size = train, val, augment, size
        self.batch_size, self.seed, self.workers, self.masks = batch_size, seed, workers, masks
        self.position = 0
        self.loader: BoxLoader | None = None

    def state_dict(self) -> dict:
        """Where the run stands in the data; Lightning restores a loader's own state in the middle of an epoch only."""
        return {"position": self.loader.position if self.loader else self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def train_dataloader(self) -> BoxLoader:
        self.loader = BoxLoader(
            self.train,
            self.augment,
            self.size,
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            masks=self.masks,
        )
        self.loader.position = self.position
        return self.loader
