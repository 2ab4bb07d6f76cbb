"""Segmentation: a network learns the class of every pixel, draws class maps, and is scored by them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from sslzoo.data.box_module import BoxBatch, clean_pictures
from sslzoo.data.box_set import IGNORE
from sslzoo.data.maps import MapSet
from sslzoo.dist import all_sum, rank, world
from sslzoo.downstream.detection import unit_range
from sslzoo.downstream.segmenters import Segmenter
from sslzoo.losses import full
from sslzoo.method import Method
from sslzoo.optim import Optim

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale inference (Zoph et al. 2020, appendix)


class Segmentation(Method):
    """Cross entropy of the pixels' classes.

    Args:
        segmenter: from ``segmenters.build``.
        optim: the optimizer's recipe.
        clip: largest norm of the gradients; None leaves them.
        side: the longer side that an image is given before it is looked at, as in training; None leaves it as it is.
    """

    sync_batchnorm = True
    settings = "task.optim"

    def __init__(
        self, segmenter: Segmenter, optim: Optim | None = None, clip: float | None = None, side: int | None = None
    ):
        super().__init__(segmenter.encoder, optim)
        self.segmenter, self.clip, self.side = segmenter, clip, side
        self.train()

    def loss(self, batch: BoxBatch) -> Tensor:
        x = unit_range(torch.stack(batch.images))  # (B, 3, S, S)
        truth = torch.stack([target["class_map"] for target in batch.targets])  # (B, S, S)
        return pixel_cross_entropy(self.segmenter(x), truth)

    def before_step(self) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)


def pixel_cross_entropy(scores: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy, the mean over the pixels of all ranks that are not 255; zero where there are none.

    Args:
        scores: ``(B, K, H, W)``.
        truth: ``(B, H, W)``, integers: 0 to K - 1, or 255.

    Returns:
        A scalar whose mean over ranks is that mean; they may have unlike numbers of such pixels.
    """
    truth = truth.long()
    total = F.cross_entropy(full(scores), truth, ignore_index=IGNORE, reduction="sum")
    return world() * total / all_sum((truth != IGNORE).sum()).clamp(min=1)


@torch.no_grad()
def probabilities(
    module: Segmentation, picture: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False
) -> Tensor:
    """What ``module``, in eval mode, takes every pixel for: ``(3, H, W) -> (K, H, W)``, the mean of softmax.

    Args:
        picture: uint8, of any size.
        scales: the image is looked at in each of these sizes.
        flip: and in a mirror.
    """
    if module.training:
        raise ValueError("the network is in training mode; call module.eval() first")
    height, width = picture.shape[1:]
    x = unit_range(picture.to(next(module.parameters()).device))[None]
    unit = 1.0 if module.side is None else module.side / max(height, width)
    found = []
    for scale in scales:
        size = [max(1, round(side * unit * scale)) for side in (height, width)]
        view = x if size == [height, width] else F.interpolate(x, size, mode="bilinear", antialias=True)
        each = [module.segmenter(view)]
        if flip:
            each.append(module.segmenter(view.flip(3)).flip(3))
        found += [F.interpolate(scores, (height, width), mode="bilinear").softmax(1) for scores in each]
    return torch.cat(found).mean(0)


def class_map(probability: Tensor, least: float = 0.0) -> Tensor:
    """The most probable class of every pixel, 255 where its probability is below ``least``.

    ``(..., K, H, W) -> (..., H, W)`` uint8. Pseudo-labels take 0.5 (Zoph et al. 2020).
    """
    confidence, best = probability.max(-3)
    return torch.where(confidence < least, IGNORE, best).to(torch.uint8)


def drawn(
    module: Segmentation,
    images: MapSet,
    rows: Sequence[int] | np.ndarray,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    least: float = 0.0,
) -> Iterator[Tensor]:
    """Class maps of some images, one after the other, in eval mode: see ``predict``."""
    training = module.training
    module.eval()
    try:
        for picture in clean_pictures(images, np.asarray(rows)):
            yield class_map(probabilities(module, picture, scales, flip), least).cpu()
    finally:
        module.train(training)


def predict(
    module: Segmentation, images: MapSet, scales: Sequence[float] = (1.0,), flip: bool = False, least: float = 0.0
) -> list[Tensor]:
    """What the network sees in every image; ranks share the work, and each gets all of it.

    Args:
        images: a set; its truth is not looked at.
        scales, flip: see ``probabilities``.
        least: see ``class_map``.

    Returns:
        One class map an image, ``(H, W)`` uint8 of the image's own size, in the set's order.
    """
    mine = list(drawn(module, images, np.arange(len(images))[rank() :: world()], scales, flip, least))
    if world() == 1:
        return mine
    everyone: list = [None] * world()
    torch.distributed.all_gather_object(everyone, mine)
    return [everyone[i % world()][i // world()] for i in range(len(images))]


def confusion(truth: MapSet, rows: np.ndarray, predictions: Iterable[Tensor]) -> Tensor:
    """How many pixels of class i were called j, ``(K, K)`` int64; pixels whose truth is 255 are left out.

    Args:
        truth: the set.
        rows: its images that were looked at.
        predictions: of each of them, ``(H, W)`` integers; 255 is no answer, and wrong.
    """
    classes = len(truth.map_classes)
    counts = torch.zeros(classes + 1, classes + 1, dtype=torch.long)
    for row, found in zip(rows.tolist(), predictions, strict=True):
        asked = truth.class_map(row).long()
        answer = torch.where(found == IGNORE, classes, found.long())
        counts += multiclass_confusion_matrix(answer, asked, classes + 1, ignore_index=IGNORE)
    return counts[:classes]


def scores(counts: Tensor, names: Sequence[str]) -> dict:
    """``miou``, ``pixel_accuracy``, and ``iou`` by class, 0 to 1, of what ``confusion`` returned.

    A class's IoU is its true positives over the pixels that are or were called so, all images together. As in PASCAL's
    and Cityscapes' protocols the mean is over classes, whatever their size. A class that is neither in the truth nor
    in the answers has none, and is left out of the mean.
    """
    right = counts.diagonal().double()  # (K,)
    union = counts.sum(1) + counts[:, : len(counts)].sum(0) - right
    there = union > 0
    iou = right / union
    return {
        "miou": float(iou[there].mean()) if there.any() else None,
        "pixel_accuracy": float(right.sum() / counts.sum()) if counts.sum() else None,
        "iou": {name: float(value) if known else None for name, value, known in zip(names, iou, there, strict=True)},
    }


def score(truth: MapSet, predictions: Sequence[Tensor]) -> dict:
    """``scores`` of the class maps of all images of a set, see ``predict``."""
    return scores(confusion(truth, np.arange(len(truth)), predictions), truth.map_classes)


def looked(
    module: Segmentation, images: MapSet, scales: Sequence[float] = (1.0,), flip: bool = False
) -> dict[str, float | dict]:
    """``scores`` on held-out images; ranks share the work and keep no maps."""
    rows = np.arange(len(images))[rank() :: world()]
    counts = confusion(images, rows, drawn(module, images, rows, scales, flip))
    return scores(all_sum(counts.to(module.device)).cpu(), images.map_classes)
