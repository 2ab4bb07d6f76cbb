"""Detection: a detector is trained on boxes, finds boxes, and is scored by them."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sslzoo.data.box_module import BoxBatch, clean_pictures
from sslzoo.data.box_set import BoxSet
from sslzoo.dist import rank, world
from sslzoo.downstream.average_precision import coco_scores, packed, voc_scores
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.monitor import log
from sslzoo.optim import Optim

METRICS = ("coco", "voc07", "voc12")


class Detection(Method):
    """The sum of a detector's losses.

    Args:
        detector: from ``detectors.build``.
        optim: the optimizer's recipe.
        clip: largest norm of the gradients; None leaves them.
    """

    sync_batchnorm = True
    settings = "task.optim"

    def __init__(self, detector: nn.Module, optim: Optim | None = None, clip: float | None = None):
        super().__init__(detector.backbone.encoder, optim)
        self.detector, self.clip = detector, clip
        self.train()

    def loss(self, batch: BoxBatch) -> Tensor:
        losses = self.detector([unit_range(image) for image in batch.images], batch.targets)
        return torch.stack(list(losses.values())).sum()

    def before_step(self) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)


def unit_range(image: Tensor) -> Tensor:
    """Pixels from 0..255 to 0..1."""
    return image.float() / 255


@torch.no_grad()
def predict(module: Detection, images: BoxSet, batch_size: int = 16) -> list[dict]:
    """What the detector finds in every image, in eval mode; ranks share the work, and each gets all of it.

    Returns:
        One dictionary an image, in the set's order and the image's own pixels: ``boxes`` (n, 4) x1, y1, x2, y2;
        ``scores`` (n,), falling; ``labels`` (n,) from 1; perhaps n ``masks`` as COCO's run lengths.
    """
    device, training = next(module.parameters()).device, module.training
    module.eval()
    try:
        mine = np.arange(len(images))[rank() :: world()]
        pictures, found = clean_pictures(images, mine), []
        while part := [unit_range(image.to(device)) for image in islice(pictures, batch_size)]:
            found += [_on_cpu(each) for each in module.detector(part)]
    finally:
        module.train(training)
    if world() == 1:
        return found
    everyone: list = [None] * world()
    torch.distributed.all_gather_object(everyone, found)
    return [everyone[i % world()][i // world()] for i in range(len(images))]


def _on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: found[name].cpu() for name in ("boxes", "scores", "labels")}
    if "masks" in found:
        kept["masks"] = packed(found["masks"])  # a hundred masks of every image would not fit in memory
    return kept


def score(truth: BoxSet, predictions: Sequence[dict], metric: str = "coco", masks: bool = False) -> dict[str, float]:
    """``map``, ``map_50``, ``map_75`` and what else the metric has, 0 to 1; what cannot be measured is left out.

    Args:
        truth: the set.
        predictions: of all its images, see ``predict``.
        metric: ``coco``; ``voc07``, by 11 points; or ``voc12``, by the area.
        masks: add COCO's of masks, as ``mask_map`` and so on.
    """
    if metric == "coco":
        scores = coco_scores(truth, predictions)
    else:
        scores = voc_scores(truth, predictions, "11point" if metric == "voc07" else "area")
    if masks:
        scores |= {f"mask_{name}": value for name, value in coco_scores(truth, predictions, iou="segm").items()}
    return {name: value for name, value in scores.items() if isinstance(value, float) and value >= 0}


class Evaluate(pl.Callback):
    """Average precision on held-out images every few epochs, and at the end; what is found last is the run's score.

    Args:
        images: held-out.
        every: epochs between two looks.
        metric, masks: see ``score``.
        batch_size: images found in at once.

    Attributes:
        values: the scores; live in the checkpoint.
        predictions: that were scored; empty in a run resumed after its end.
    """

    def __init__(self, images: BoxSet, every: int = 1, metric: str = "coco", masks: bool = False, batch_size: int = 16):
        if metric not in METRICS:
            raise UserError(f"task.metric={metric} is none of {', '.join(METRICS)}")
        if every < 1:
            raise UserError(f"task.every_epochs={every} is no number of epochs; set it to 1 or more")
        self.images, self.every, self.metric, self.masks, self.batch_size = images, every, metric, masks, batch_size
        self.values: dict[str, float] = {}
        self.predictions: list[dict] = []

    def state_dict(self) -> dict:
        return {"values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.values = state["values"]

    def on_train_epoch_end(self, trainer, module: Detection) -> None:
        if (trainer.current_epoch + 1) % self.every and trainer.global_step < module.steps:
            return
        self.predictions = predict(module, self.images, self.batch_size)
        self.values = score(self.images, self.predictions, self.metric, self.masks)
        log(trainer, self.values)
