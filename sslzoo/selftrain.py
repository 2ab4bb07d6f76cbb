"""Self-training: a teacher labels images, a student learns from these labels beside those of people.

Zoph et al. 2020, "Rethinking Pre-training and Self-training", arXiv 2006.06882, sec. 3: a teacher is trained on the
labels; ``select`` keeps what it is sure of in unlabelled images, by a hard threshold; a student is trained from the
teacher's own start, not from its weights, on batches that are half human and half pseudo-labelled
(``sslzoo.data.mixed``), by the sum of two losses that ``LossBalance`` weighs. The student's noise is its augmentation.
Classes of images are kept by ``confident`` and ``equal_classes`` (Xie et al. 2020, "Noisy Student", arXiv 1911.04252).
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sslzoo.data.box_set import BoxSet
from sslzoo.data.mixed import MixedBatch
from sslzoo.data.pseudo_labels import PseudoLabels
from sslzoo.dist import all_mean
from sslzoo.errors import UserError
from sslzoo.method import Method

MATCH_DENSITY = "match-density"


def select(
    images: BoxSet, predictions: Sequence[dict], threshold: float | str = 0.5, density: float = 0.0, smallest: float = 2
) -> PseudoLabels:
    """The boxes that a teacher is sure of; overlapping ones are gone already, by its own suppression.

    Args:
        images: N unlabelled images.
        predictions: what was found in each, as ``downstream.detection.predict`` returns it.
        threshold: boxes of this score or more are kept: 0.5 in the paper. Or ``match-density``: the score at which
            there are as many boxes an image as in the labelled set, which needs no labels of these images.
        density: boxes per labelled image, for ``match-density``.
        smallest: boxes, cut to their image, that are less wide or high are dropped, in pixels.

    Raises:
        UserError: on another threshold.
    """
    if len(predictions) != len(images):
        raise ValueError(f"{len(predictions)} predictions for {len(images)} images")
    check_threshold(threshold)
    parts = [_inside(images, i, found, smallest) for i, found in enumerate(predictions)]
    scores = np.concatenate([found["scores"] for found in parts])
    least = density_threshold(scores, density * len(images)) if threshold == MATCH_DENSITY else float(threshold)
    kept = scores >= least
    counts = [int((found["scores"] >= least).sum()) for found in parts]
    boxes = np.concatenate([found["boxes"] for found in parts])[kept]
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    masks = [mask for found in parts for mask in found["masks"]]
    blank = images.unlabelled()
    labelled = BoxSet(
        **{
            **vars(blank),
            "starts": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "xywh": xywh,
            "labels": np.concatenate([found["labels"] for found in parts])[kept],
            "areas": xywh[:, 2] * xywh[:, 3],
            "crowd": np.zeros(len(xywh), bool),
            "difficult": np.zeros(len(xywh), bool),
            "segmentations": [mask for mask, keep in zip(masks, kept, strict=True) if keep] if masks else None,
        }
    )
    return PseudoLabels(labelled, scores[kept], least)


def check_threshold(threshold: float | str) -> None:
    """Refuse, by UserError, what ``select`` cannot cut at."""
    if threshold != MATCH_DENSITY and not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
        raise UserError(f"threshold={threshold} is neither a score from 0 to 1 nor {MATCH_DENSITY}")


def check_probability(name: str, value: object) -> None:
    """Refuse, by UserError, a setting that is no probability."""
    if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value <= 1):
        raise UserError(f"{name}={value} is no probability; give 0 to 1, e.g. 0.5")


def _inside(images: BoxSet, i: int, found: dict, smallest: float) -> dict:
    """One image's boxes cut to it, as arrays; without the small ones."""
    height, width = images.sizes[i].tolist()
    boxes = torch.as_tensor(found["boxes"]).double().numpy().reshape(-1, 4).clip(0, [width, height] * 2)
    large = (boxes[:, 2:] - boxes[:, :2] >= smallest).all(1)
    return {
        "boxes": boxes[large],
        "scores": torch.as_tensor(found["scores"]).double().numpy()[large],
        "labels": torch.as_tensor(found["labels"]).numpy().astype(np.int64)[large],
        "masks": [mask for mask, keep in zip(found.get("masks", []), large, strict=False) if keep],
    }


def density_threshold(scores: np.ndarray, wanted: float) -> float:
    """The score that ``wanted`` of all boxes reach, to the nearest whole box; their lowest where there are fewer."""
    count = min(int(wanted + 0.5), len(scores))
    return float(np.sort(scores)[-count]) if count else 1.0


def confident(probabilities: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Images whose most probable class has ``threshold`` or more (Noisy Student: 0.3), ascending.

    Args:
        probabilities: a teacher's, ``(N, C)``.

    Raises:
        UserError: on a threshold that is no probability.
    """
    check_probability("threshold", threshold)
    return np.flatnonzero(probabilities.max(1, initial=0) >= threshold)


def equal_classes(probabilities: np.ndarray, rows: np.ndarray, per_class: int) -> np.ndarray:
    """As many images of each class: its most confident ones, which are repeated in turn where there are fewer.

    Noisy Student, sec. 3.1. A class that no image is said to show stays without any.

    Args:
        probabilities: a teacher's, ``(N, C)``.
        rows: ``(n,)``, the images to choose from.
        per_class: how many of each.

    Returns:
        Rows, class by class, the most confident of each first, int64.
    """
    classes, best = probabilities[rows].argmax(1), probabilities[rows].max(1, initial=0)
    order = rows[np.lexsort((-best, classes))]  # stable: equal ones stay in their order
    counts = np.bincount(classes, minlength=probabilities.shape[1])
    of_class = np.split(order, np.cumsum(counts)[:-1])
    return np.concatenate([np.resize(found, per_class if len(found) else 0) for found in of_class])


class LossBalance(nn.Module):
    """The sum of two losses, the second one at the scale of the first (Zoph et al. 2020, appendix).

    ``L = 1 / (1 + a) * (L_h + a * (mean L_h / mean L_p) * L_p)``: the means move with decay 0.9997 over all ranks,
    and carry no gradient. Both begin at zero and move together, so that what they still lack cancels in their ratio.

    Args:
        alpha: a, weight of the pseudo-labels; the paper tries 0.25 to 4.
        decay: of the means.

    Attributes:
        means: mean L_h and mean L_p, ``(2,)`` float32; in the checkpoint.
    """

    LIMIT = 100.0  # of the ratio, either way: a loss that has vanished must not be blown up

    def __init__(self, alpha: float = 1.0, decay: float = 0.9997):
        super().__init__()
        if alpha < 0 or not 0 <= decay < 1:
            raise UserError(f"alpha={alpha}, decay={decay}: give an alpha of 0 or more, and a decay from 0 to below 1")
        self.alpha, self.decay = alpha, decay
        self.means: Tensor
        self.register_buffer("means", torch.zeros(2))

    def forward(self, human: Tensor, pseudo: Tensor) -> Tensor:
        """Two scalars to one; call it once a step. Where no rank has a pseudo-label, which costs 0, the means stay."""
        now = all_mean(torch.stack([human, pseudo]).to(self.means))
        self.means.lerp_(now, (1 - self.decay) * (now[1] > 0))
        mean_human, mean_pseudo = self.means
        smallest = torch.finfo(self.means.dtype).tiny
        ratio = (mean_human / mean_pseudo.clamp(min=smallest)).clamp(1 / self.LIMIT, self.LIMIT)
        return (human + self.alpha * ratio * pseudo) / (1 + self.alpha)


class Student(Method):
    """A learner whose every batch is half human, half pseudo-labelled.

    Each half is one forward pass. So BatchNorm normalises it with its own statistics, and its running ones, which
    predictions use, are the mean over both; GroupNorm knows no batch; and a detector's loss is divided by the objects
    of its own half, which an image without any can not dominate.

    Args:
        learner: what learns, e.g. ``Detection``; its optimizer, clipping and norms are the student's.
        balance: weighs the halves.
    """

    def __init__(self, learner: Method, balance: LossBalance):
        super().__init__(learner.encoder, learner.optim)
        self.learner, self.balance = learner, balance
        self.sync_batchnorm, self.settings, self.seed = learner.sync_batchnorm, learner.settings, learner.seed

    def forward(self, x):
        """What the learner says of ``x``."""
        return self.learner(x)

    def loss(self, batch: MixedBatch) -> Tensor:
        return self.balance(self.learner.loss(batch.human), self.learner.loss(batch.pseudo))

    def before_step(self) -> None:
        self.learner.before_step()

    def after_step(self) -> None:
        self.learner.after_step()

    def parameter_groups(self) -> list[dict]:
        return self.learner.parameter_groups()


def fingerprint(module: nn.Module) -> str:
    """A short hash of all weights and buffers: equal for equal starts."""
    told = hashlib.sha256()
    for name, value in module.state_dict().items():
        told.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return told.hexdigest()[:16]
