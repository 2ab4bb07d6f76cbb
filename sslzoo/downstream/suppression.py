"""Which of many overlapping boxes stay: torchvision's hard suppression, or soft-NMS."""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("hard", "soft")


@dataclass(frozen=True)
class Suppression:
    """Which of many overlapping boxes stay.

    Args:
        kind: ``hard`` drops a box that overlaps a better one of its class by more than ``iou``; ``soft`` lowers its
            score by ``exp(-overlap^2 / sigma)`` (Bodla et al. 2017, arXiv 1704.04503).
        iou: of hard suppression.
        sigma: of soft suppression; 0.3 as in Zoph et al. 2020.
        score: boxes of a lower score are dropped.
        limit: at most so many boxes an image.
    """

    kind: str = "hard"
    iou: float = 0.5
    sigma: float = 0.3
    score: float = 0.05
    limit: int = 100

    @property
    def torchvisions(self) -> dict[str, float]:
        """Settings of torchvision's own suppression, which leaves every box to ``__call__`` where ours is soft."""
        soft = self.kind == "soft"
        iou, limit = (1.0, 10**6) if soft else (self.iou, self.limit)
        return {"score_thresh": self.score, "nms_thresh": iou, "detections_per_img": limit}

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (n, 4), scores (n,) and labels (n,) that stay, the best first."""
        if self.kind == "hard":
            return boxes, scores, labels
        kept, scores = soft_nms(boxes, scores, labels, self.sigma, self.score, self.limit)
        return boxes[kept], scores, labels[kept]


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, sigma: float = 0.3, score: float = 0.05, limit: int = 100
) -> tuple[Tensor, Tensor]:
    """Soft-NMS with a Gaussian (Bodla et al. 2017, sec. 3), all classes at once.

    The best box of a class is taken, the others of that class are lowered by ``exp(-IoU^2 / sigma)``, and so on.

    Args:
        boxes: ``(n, 4)`` corners.
        scores: ``(n,)``, not negative.
        labels: ``(n,)``.
        sigma: width of the Gaussian.
        score: boxes that fall below it are dropped.
        limit: at most so many boxes.

    Returns:
        Rows of ``boxes`` that stay, ``(k,)``, and their lowered scores, ``(k,)``, falling.
    """
    if not len(boxes):
        return labels.new_zeros(0, dtype=torch.long), scores
    _, group, counts = labels.unique(return_inverse=True, return_counts=True)
    # One row a class, filled up with boxes of score -1: (C, m)
    order = group.argsort(stable=True)
    place = torch.arange(len(boxes), device=boxes.device) - (counts.cumsum(0) - counts)[group[order]]
    rows = order.new_zeros(len(counts), int(counts.max()))
    left = scores.new_full(rows.shape, -1.0)
    rows[group[order], place] = order
    left[group[order], place] = scores[order]
    inside = boxes[rows]  # (C, m, 4)
    areas = _area(inside)
    each = torch.arange(len(counts), device=boxes.device)
    found = []
    for _ in range(min(limit, rows.shape[1])):  # scores fall: no class has more than `limit` of the best `limit`
        best, at = left.max(1)  # (C,)
        if not (best >= score).any():
            break
        found.append((rows[each, at], best))
        taken = inside[each, at][:, None]  # (C, 1, 4)
        shared = _area(torch.cat([torch.maximum(inside, taken)[..., :2], torch.minimum(inside, taken)[..., 2:]], -1))
        union = areas + _area(taken) - shared
        overlap = torch.where(union > 0, shared / union, torch.zeros_like(union))
        left = torch.where(left < 0, left, left * torch.exp(-overlap.square() / sigma))
        left[each, at] = -1.0
    if not found:
        return order[:0], scores[:0]
    kept, lowered = torch.cat([rows for rows, _ in found]), torch.cat([best for _, best in found])
    lowered, best_first = lowered.sort(descending=True, stable=True)
    enough = lowered >= score
    return kept[best_first][enough][:limit], lowered[enough][:limit]


def _area(boxes: Tensor) -> Tensor:
    """``(..., 4) -> (...)``; an empty box has none."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
