"""Batches for a student: one half labelled by people, one half by its teacher (Zoph et al. 2020, sec. 3)."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

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


class MixedLoader:
    """A batch of one loader and one of another in every step, each in its own set's epochs.

    An epoch is one of the human labels. Both loaders have given out equally many batches at any time.

    Args:
        human, pseudo: any two of ``sslzoo.data``, of one batch size.

    Attributes:
        position: steps since the run began; lives in the checkpoint.
    """

    def __init__(self, human, pseudo):
        if human.batch_size != pseudo.batch_size:
            raise ValueError(f"halves of {human.batch_size} and {pseudo.batch_size} images")
        self.human, self.pseudo = human, pseudo

    @property
    def position(self) -> int:
        return self.human.position

    @position.setter
    def position(self, steps: int) -> None:
        self.human.position = self.pseudo.position = steps

    def __len__(self) -> int:
        return len(self.human)

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[MixedBatch]:
        """From ``position`` to the end of the human labels' epoch."""
        self.position = self.human.position
        pseudo = _endless(self.pseudo)
        try:
            for human in self.human:
                yield MixedBatch(human, next(pseudo))
        finally:
            pseudo.close()  # what it made ahead is made again: an image looks the same in the same epoch


def _endless(loader) -> Iterator[NamedTuple]:
    while True:
        yield from loader


class Mixed(pl.LightningDataModule):
    """Training batches of two data modules at once.

    Args:
        human: labelled by people; its held-out set is this one's.
        pseudo: labelled by a teacher, with batches as large, and a seed of its own.
    """

    def __init__(self, human: pl.LightningDataModule, pseudo: pl.LightningDataModule):
        super().__init__()
        self.human, self.pseudo, self.val = human, pseudo, human.val
        self.batch_size = human.batch_size + pseudo.batch_size
        self.position = 0
        self.loader: MixedLoader | None = None

    def state_dict(self) -> dict:
        return {"position": self.loader.position if self.loader else self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    @property
    def clean(self) -> Clean:
        """The view without augmentation, of data that have one."""
        return self.human.clean

    @property
    def on_error(self) -> str:
        """What a damaged file does, see ``Reader``."""
        return self.human.on_error

    @property
    def skipped(self) -> list[Path]:
        """Pictures that this process could not read."""
        return sorted({*self.human.skipped, *self.pseudo.skipped})

    def train_dataloader(self) -> MixedLoader:
        self.human.trainer = self.pseudo.trainer = self.trainer
        self.loader = MixedLoader(self.human.train_dataloader(), self.pseudo.train_dataloader())
        self.loader.position = self.position
        return self.loader
