"""Scores of keypoints: the normalised mean error, and the part of correct keypoints."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from sslzoo.data.box_set import BoxSet
from sslzoo.data.points import PointSet
from sslzoo.errors import UserError


def score(examples: PointSet, found: Tensor, normalise: str = "box", pck: float = 0.1) -> dict[str, float]:
    """How far found points are from the labelled ones, in units of the object.

    Args:
        examples: N objects of K points.
        found: ``(N, K, 2)``, see ``predict``.
        normalise: the unit, see ``PointSet.normalisers``; objects of which it is unknown are left out.
        pck: within how many of it a point is right.

    Returns:
        ``nme``, the mean distance, and ``pck``, the part of the points that are right, both over labelled points;
        ``scored_points``, how many these are. Without any, the first two are missing.
    """
    return point_scores(found.numpy(), examples.points, examples.normalisers(normalise), pck)


def point_scores(found: np.ndarray, points: np.ndarray, unit: np.ndarray, pck: float) -> dict[str, float]:
    """``score`` of plain arrays: ``(N, K, 2)``, ``(N, K, 3)`` and ``(N,)``.

    A point found at NaN is wrong, and has no distance.
    """
    distance = np.hypot(*np.moveaxis(found.astype(float) - points[..., :2], -1, 0)) / unit[:, None]
    scored = (points[..., 2] > 0) & np.isfinite(unit)[:, None]
    placed = scored & np.isfinite(distance)
    scores: dict[str, float] = {"scored_points": int(scored.sum())}
    if placed.any():
        scores["nme"] = float(distance[placed].mean())
    if scored.any():
        scores["pck"] = float((distance[placed] <= pck).sum() / scored.sum())
    return scores


def check_scores(examples: PointSet, normalise: str, pck: float) -> None:
    """Refuse, by UserError, scores that cannot be told of these examples."""
    if not (math.isfinite(pck) and pck > 0):
        raise UserError(f"task.pck={pck} is no distance; set it to more than 0, e.g. 0.1")
    if not np.isfinite(examples.normalisers(normalise)).any():
        raise UserError(
            f"task.normalise={normalise} is unknown of all {len(examples)} held-out objects of data={examples.name};"
            " set task.normalise=box"
        )


def matched(truth: BoxSet, predictions: Sequence[dict], iou: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """What a detector found of each object with a labelled point, crowds left out.

    Args:
        truth: M such objects.
        predictions: of all images, with ``boxes``, ``scores`` and ``keypoints``.
        iou: a detection whose box overlaps an object's by less has not found it.

    Returns:
        Rows of the objects, ``(M,)``, and the points ``(M, K, 2)`` of the detection that overlaps each most; NaN where
        it was not found. Two objects may share one.
    """
    rows, found = [], []
    for i, each in enumerate(predictions):
        own = np.arange(*truth.rows(i).indices(len(truth.labels)))
        own = own[(truth.keypoints[own][..., 2] > 0).any(1) & ~truth.crowd[own]]
        corners = torch.from_numpy(truth.xywh[own]).clone()
        corners[:, 2:] += corners[:, :2]
        points = each["keypoints"][..., :2].double()  # (n, K, 2)
        if len(points):
            overlap, best = box_iou(corners, each["boxes"].double()).max(1)
            points = torch.where((overlap >= iou)[:, None, None], points[best], torch.nan)
        else:
            points = torch.full((len(own), *truth.keypoints.shape[1:2], 2), torch.nan, dtype=torch.double)
        rows.append(own)
        found.append(points.numpy())
    return np.concatenate(rows), np.concatenate(found)
