"""What all methods are: views in, loss out.

Legend of shapes: B images per rank, V views, D encoder width, d projection, K keys or prototypes, N training
images, W ranks.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslzoo.blocks.encoder import Encoder
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.dist import check_same, from_rank_zero, rank
from sslzoo.memory import memory_buffers
from sslzoo.optim import Optim


class Batch(NamedTuple):
    """One step's input on one rank.

    Attributes:
        views: V tensors ``(B, 3, H_v, W_v)``, normalised.
        index: ``(B,)`` int64, position in the training set.
        label: ``(B,)`` int64 for monitors only; no method reads it; -1 where unknown.
    """

    views: list[Tensor]
    index: Tensor
    label: Tensor


class Method(pl.LightningModule, ABC):
    """Views in, loss out.

    A method needs no trainer. In a loop of your own::

        loss = method.loss(batch)
        loss.backward()
        method.before_step()
        optimizer.step()
        method.after_step()

    Args:
        encoder: the backbone being trained.
        optim: what the recipe says of the optimizer.

    Attributes:
        step: optimizer steps taken; with ``seed`` it decides every random draw inside the method.
        steps: optimizer steps of the whole run.
        epochs: epochs of the whole run.
        seed: the run's.
        accumulates: whether two accumulated halves of a batch equal the whole; not where images of one batch are
            each other's negatives, or are normalised together.
        sync_batchnorm: whether BatchNorm takes its statistics over all ranks.
        compares_views: whether a batch has two or more views of each image, or exactly one.
    """

    accumulates = True
    sync_batchnorm = False
    settings = "optim"  # where the configuration says what ``optim`` is
    compares_views = True

    def __init__(self, encoder: Encoder, optim: Optim | None = None):
        super().__init__()
        self.encoder = encoder
        self.optim = optim or Optim()
        self.seed, self.step, self.steps, self.epochs = 0, 0, 1, 1

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The paper's objective on one batch: a scalar, the mean over this rank's images."""

    def check(self, batch_size: int) -> None:
        """Refuse, by UserError, a global batch that the method cannot work with; called before anything starts."""

    def check_views(self, views: list[Tensor]) -> None:
        """Refuse, by UserError, views ``V x (b, 3, H_v, W_v)`` of a few images; called before anything starts."""

    def before_step(self) -> None:
        """What happens to gradients between the backward pass and the optimizer."""

    def after_step(self) -> None:
        """What moves without a gradient, once an optimizer step."""

    def parameter_groups(self) -> list[dict]:
        """Trainable parameters as the recipe's ``exclude`` splits them."""
        return self.optim.groups(self.parameters())

    def loss_at_chance(self) -> float | None:
        """The loss of features that tell nothing apart, e.g. ``ln K``; None where the method has no such value."""
        return None

    @property
    def backbone(self) -> Encoder:
        """What to keep of the run."""
        return self.encoder

    @property
    def kept_projector(self) -> nn.Sequential | None:
        """First layers of the projector that fine-tuning can start from (SimCLR v2, sec. 2); mostly none."""
        return None

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.step / self.steps

    def first_step(self, epoch: float) -> int:
        """The optimizer step with which ``epoch`` begins, counted from 0; it may lie within one."""
        return math.ceil(epoch * self.steps / self.epochs)

    # What follows is Lightning's side: who calls the above, and when.

    def on_train_start(self) -> None:
        check_same(self.trainer.num_training_batches, self.device, "epochs of {} batches")
        self.steps = int(self.trainer.estimated_stepping_batches)
        self.epochs = max(1, round(self.steps / self.steps_per_epoch))
        for buffer in memory_buffers(self).values():
            from_rank_zero(buffer)

    def configure_model(self) -> None:
        if self.sync_batchnorm and self.trainer.world_size > 1:
            sync_batchnorm(self, self.trainer.strategy.root_device)
        # Memories are equal on all ranks by construction: DDP need not send them every step.
        self._ddp_params_and_buffers_to_ignore = list(memory_buffers(self))

    def configure_optimizers(self) -> Optimizer:
        return self.optim.build(self.parameter_groups())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.step = self.trainer.global_step
        check_same(len(batch.index), self.device)
        # Dropout and stochastic depth draw from here: the same in a resumed run, different on each rank.
        seed = hash((self.seed, self.step, batch_idx, rank())) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device each time
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return self.loss(batch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data; a short last accumulation makes one too."""
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.optim.set(optimizer, self.step, self.steps, self.steps_per_epoch)
        self.before_step()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            self.after_step()
