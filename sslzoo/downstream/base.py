"""What learns from labels, or from a teacher: a network that names classes, its training, its score."""

from abc import abstractmethod

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sslzoo.data.images import ImageSet
from sslzoo.data.module import clean_batches
from sslzoo.dist import all_sum, rank, world
from sslzoo.method import Method
from sslzoo.views import Clean


class Downstream(Method):
    """Images and labels in, loss out; and ``forward`` gives class scores.

    Steps, rates, seeds and checkpoints are those of every Method. BatchNorm takes its statistics over all ranks, so
    that two ranks learn what one would.
    """

    sync_batchnorm = True
    settings = "task.optim"

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Class scores, ``(B, 3, H, W) -> (B, C)``."""


@torch.no_grad()
def answers(module: torch.nn.Module, images: ImageSet, clean: Clean, on_error: str = "raise") -> Tensor:
    """Which labelled images ``module`` names right, in eval mode and without augmentation; every rank takes a part.

    Returns:
        ``(3, N)`` float64 of 0 and 1: right, right among the five best, and asked at all.
    """
    weight = next(module.parameters())
    training = module.training
    found = torch.zeros(3, len(images), dtype=torch.double)
    module.eval()
    try:
        rows = np.flatnonzero(images.labels >= 0)[rank() :: world()]
        for x, part in clean_batches(images, clean, rows=rows, on_error=on_error):
            scores = module(x.to(weight.device, weight.dtype)).cpu()
            best = scores.topk(min(5, scores.shape[1]), dim=1).indices
            right = best == torch.from_numpy(images.labels[part])[:, None]  # (b, 5)
            found[:, part] = torch.stack([right[:, 0], right.any(1), torch.ones(len(part))]).double()
    finally:
        module.train(training)
    return all_sum(found.to(weight.device, torch.float)).double().cpu()


def accuracies(found: Tensor, prefix: str) -> dict[str, float | None]:
    """``PREFIX_top1`` and ``PREFIX_top5`` of what ``answers`` returned; None where nothing was asked."""
    asked = found[2].sum()
    names = f"{prefix}_top1", f"{prefix}_top5"
    return {name: float(row.sum() / asked) if asked else None for name, row in zip(names, found, strict=False)}


class Evaluate(pl.Callback):
    """Accuracy on held-out images at the end of epochs; what is found last is the run's score.

    Args:
        images: held-out, or None.
        clean: the view without augmentation.
        prefix: of the scores' names.
        on_error: see ``Reader``.
        every: epochs between two looks; the end of the run is always looked at.

    Attributes:
        found: see ``answers``; lives in the checkpoint.
        values: the accuracies.
    """

    def __init__(self, images: ImageSet | None, clean: Clean, prefix: str, on_error: str = "raise", every: int = 1):
        self.images, self.clean, self.prefix, self.on_error = images, clean, prefix, on_error
        self.every = every
        self.found = torch.zeros(3, 0, dtype=torch.double)

    @property
    def values(self) -> dict[str, float | None]:
        return accuracies(self.found, self.prefix)

    @property
    def right(self) -> np.ndarray:
        """Whether each image that was asked was named right, ``(n,)``."""
        return self.found[0][self.found[2] > 0].numpy()

    def state_dict(self) -> dict:
        return {"found": self.found}

    def load_state_dict(self, state: dict) -> None:
        self.found = state["found"]

    def on_train_epoch_end(self, trainer, module: Downstream) -> None:
        if self.images is None or ((trainer.current_epoch + 1) % self.every and trainer.global_step < module.steps):
            return
        self.found = answers(module, self.images, self.clean, self.on_error)
        row = {key: value for key, value in self.values.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch, **row}, step=trainer.global_step)
