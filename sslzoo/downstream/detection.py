"""Detection: a detector is trained on boxes, finds boxes, and is scored by them."""

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat

import numpy as np
import torch
from torch import Tensor, nn

from sslzoo.data.box_module import BoxBatch, BoxLoader, clean_pictures
from sslzoo.data.box_set import BoxSet
from sslzoo.dist import rank, world
from sslzoo.downstream.average_precision import coco_scores, packed, voc_scores
from sslzoo.errors import UserError
from sslzoo.method import Method
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


def first_batches(loader: BoxLoader, images: int) -> Iterator[BoxBatch]:
    """The run's first batches once more, until they hold ``images`` images; ``loader`` stays where it is."""
    again = copy.copy(loader)
    again.position = 0
    return islice(chain.from_iterable(repeat(again)), math.ceil(images / loader.batch_size))


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
    if "keypoints" in found:
        kept["keypoints"] = found["keypoints"].cpu()
    if "masks" in found:
        kept["masks"] = packed(found["masks"])  # a hundred masks of every image would not fit in memory
    return kept


def check_metric(metric: str) -> None:
    """Refuse, by UserError, a metric that ``score`` does not know."""
    if metric not in METRICS:
        raise UserError(f"task.metric={metric} is none of {', '.join(METRICS)}")


def score(truth: BoxSet, predictions: Sequence[dict], metric: str = "coco", masks: bool = False) -> dict[str, float]:
    """``map``, ``map_50``, ``map_75`` and what else the metric has, 0 to 1; what cannot be measured is left out.

    Args:
        truth: the set.
        predictions: of all its images, see ``predict``.
        metric: ``coco``; ``voc07``, by 11 points; or ``voc12``, by the area.
        masks: add COCO's of masks, as ``mask_map`` and so on.

    Raises:
        UserError: on another metric.
    """
    check_metric(metric)
    if metric == "coco":
        scores = coco_scores(truth, predictions)
    else:
        scores = voc_scores(truth, predictions, "11point" if metric == "voc07" else "area")
    if masks:
        scores |= {f"mask_{name}": value for name, value in coco_scores(truth, predictions, iou="segm").items()}
    return {name: value for name, value in scores.items() if isinstance(value, float) and value >= 0}
