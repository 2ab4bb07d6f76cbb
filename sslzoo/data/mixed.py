"""Batches of two sets at once (Zoph et al. 2020): labels of people and of a teacher; boxes and classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from sslzoo.method import Batch
from sslzoo.views import Clean


class MixedBatch(NamedTuple):
    """One step's input on one rank: as many images of either kind.

    Attributes:
        human: labelled by people.
        pseudo: labelled by a teacher.
    """

    human: NamedTuple
    pseudo: NamedTuple

    @property
    def index(self) -> Tensor:
        """Positions in the two sets, ``(2B,)``."""
        return torch.cat([self.human.index, self.pseudo.index])

    @staticmethod
    def counted(human: int, pseudo: int) -> int:
        """Images that a step counts as seen, of its two batch sizes; they must be equal."""
        if human != pseudo:
            raise ValueError(f"halves of {human} and {pseudo} images")
        return human + pseudo


class JointBatch(NamedTuple):
    """One step's input on one rank: of a learner, and of the classifier that learns beside it.

    Attributes:
        first: what the learner takes, of B images.
        classified: one view of B' images, with their classes; they are not counted as seen.
    """

    first: NamedTuple
    classified: Batch

    @property
    def index(self) -> Tensor:
        """Positions in the learner's set, ``(B,)``."""
        return self.first.index

    @staticmethod
    def counted(first: int, classified: int) -> int:
        """Images that a step counts as seen, of its two batch sizes: the learner's."""
        return first


Kind = type[MixedBatch] | type[JointBatch]


class MixedLoader:
    """A batch of one loader and one of another in every step, each in its own set's epochs.

    An epoch is one of the first. Both loaders have given out equally many batches at any time.

    Args:
        first, second: any two of ``sslzoo.data``, or a mixed one.
        kind: of the batches.

    Attributes:
        position: steps since the run began; lives in the checkpoint.
        batch_size: images per step over all ranks that are counted as seen.
    """

    def __init__(self, first, second, kind: Kind = MixedBatch):
        self.first, self.second, self.kind = first, second, kind
        self.batch_size = kind.counted(first.batch_size, second.batch_size)

    @property
    def position(self) -> int:
        return self.first.position

    @position.setter
    def position(self, steps: int) -> None:
        self.first.position = self.second.position = steps

    def __len__(self) -> int:
        return len(self.first)

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[MixedBatch | JointBatch]:
        """From ``position`` to the end of the first loader's epoch."""
        self.position = self.first.position
        others = _endless(self.second)
        try:
            for batch in self.first:
                yield self.kind(batch, next(others))
        finally:
            others.close()  # what it made ahead is made again: an image looks the same in the same epoch


def _endless(loader) -> Iterator[NamedTuple]:
    while True:
        yield from loader


class Mixed(pl.LightningDataModule):
    """Training batches of two data modules at once.

    Args:
        first: e.g. labelled by people; its held-out set is this one's.
        second: with a seed of its own.
        kind: of the batches: ``MixedBatch`` takes as many images of both.
    """

    def __init__(self, first: pl.LightningDataModule, second: pl.LightningDataModule, kind: Kind = MixedBatch):
        super().__init__()
        self.first, self.second, self.kind, self.val = first, second, kind, first.val
        self.batch_size = kind.counted(first.batch_size, second.batch_size)
        self.position = 0
        self.loader: MixedLoader | None = None

    def state_dict(self) -> dict:
        return {"position": self.loader.position if self.loader else self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    @property
    def clean(self) -> Clean:
        """The view without augmentation, of data that have one."""
        return self.first.clean

    @property
    def on_error(self) -> str:
        """What a damaged file does, see ``Reader``."""
        return self.first.on_error

    @property
    def skipped(self) -> list[Path]:
        """Pictures that this process could not read."""
        return sorted({*self.first.skipped, *self.second.skipped})

    def train_dataloader(self) -> MixedLoader:
        self.first.trainer = self.second.trainer = self.trainer
        self.loader = MixedLoader(self.first.train_dataloader(), self.second.train_dataloader(), self.kind)
        self.loader.position = self.position
        return self.loader
