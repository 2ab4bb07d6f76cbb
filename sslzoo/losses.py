"""Losses as pure functions on ``(B, d)`` tensors of any float dtype: what two methods share, and CPC's of patches.

Half-precision inputs are computed in float32: a temperature of 0.07 turns bfloat16's rounding of a cosine into
errors of the size of the loss. Inputs are taken as they are; the caller normalises.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sslzoo.dist import all_gather, all_gather_with_grad, rank, world

NCE_EPS = 1e-7  # as in the official code


def full(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """Rows of ``x`` at length one, in at least float32: ``(B, d) -> (B, d)``."""
    return F.normalize(full(x), dim=1)


def info_nce(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE of queries against their keys and shared negatives (MoCo, eq. 1).

    ``-log exp(q.k / T) / (exp(q.k / T) + sum_n exp(q.n / T))``, the mean over queries.

    Args:
        q: queries, ``(B, d)``.
        k: the positive key of each query, ``(B, d)``.
        negatives: ``(K, d)``, the same for all queries.
        temperature: T.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, negatives = full(q), full(k), full(negatives).to(q.device)
        q = q / temperature  # here and not on the logits: two passes over (B, K) less
        positive = (q * k).sum(1)  # (B,)
        negative = (q @ negatives.T).logsumexp(1)  # (B,)
        return (torch.logaddexp(positive, negative) - positive).mean()


def patch_info_nce(predictions: Tensor, targets: Tensor, offset: int, scale: float, group: int) -> Tensor:
    """InfoNCE of predicted patches: which of all patches in a group of images lies ``offset`` rows further down?

    Args:
        predictions: made in rows 0 to G - offset - 1, ``(B, G - offset, G, d)``.
        targets: features of all patches, ``(B, G, G, d)``.
        offset: rows from where a prediction is made to its target.
        scale: of predictions.
        group: images whose patches are candidates; divides B.

    Returns:
        The mean over predictions.
    """
    (batch, rows, columns), d = targets.shape[:3], targets.shape[3]
    with torch.autocast(targets.device.type, enabled=False):
        p = full(predictions).reshape(batch // group, -1, d) * scale  # (groups, group * (G - offset) * G, d)
        t = full(targets).reshape(batch // group, -1, d)  # (groups, group * G * G, d)
        places = torch.arange(group * rows * columns, device=t.device).view(group, rows, columns)
        label = places[:, offset:].reshape(-1)  # of the target of each prediction
        logits = p @ t.mT  # (groups, group * (G - offset) * G, group * G * G)
        return F.cross_entropy(logits.flatten(0, 1), label.repeat(len(t)))


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, negatives: Tensor | None = None) -> Tensor:
    """Normalised temperature-scaled cross entropy (SimCLR, eq. 1), the mean over 2B anchors.

    A view is told from the 2WB - 2 views of other images on all ranks; gradients reach all ranks. The official
    code's value is the sum of its two halves, twice this mean.

    Args:
        z1, z2: projections of the two views, ``(B, d)`` each.
        temperature: T.
        negatives: ``(K, d)``, more of them from a memory (SimCLR v2).
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = full(z1), full(z2)
        anchors = torch.cat([z1, z2])  # (2B, d)
        g1, g2 = all_gather_with_grad(z1), all_gather_with_grad(z2)
        own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
        twin = torch.cat([own + len(g1), own])
        logits = anchors @ torch.cat([g1, g2]).T / temperature  # (2B, 2WB)
        itself = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, torch.cat([own, own + len(g1)])[:, None], True)
        logits = logits.masked_fill(itself, float("-inf"))
        if negatives is not None:
            logits = torch.cat([logits, anchors @ full(negatives).to(anchors).T / temperature], 1)  # (2B, 2WB + K)
        return F.cross_entropy(logits, twin)


def candidate_scores(f: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """How well features ``(B, d)`` fit candidates, ``f.v / T``: each its own, ``(B, K, d)``, or all the same,
    ``(K, d)``; ``-> (B, K)``."""
    with torch.autocast(f.device.type, enabled=False):
        f, candidates = full(f), full(candidates)
        if candidates.ndim == 2:
            return f @ candidates.T / temperature
        return (candidates @ f[:, :, None]).squeeze(2) / temperature


def first_of(scores: Tensor) -> Tensor:
    """Cross entropy of picking the first candidate, ``(B, K)`` scores: softmax in place of NCE."""
    scores = full(scores)
    return (scores.logsumexp(1) - scores[:, 0]).mean()


def nce(scores: Tensor, log_z: Tensor, size: int) -> Tensor:
    """Noise-contrastive estimation with a constant Z (InstDisc, eq. 7): is a candidate data, or uniform noise?

    With ``P = exp(score) / Z`` and m candidates drawn from ``size`` images, ``c = m / size + 1e-7``:
    ``-log P_0 / (P_0 + c) - sum_n log (m / size) / (P_n + c)``, the mean over rows. That is logistic regression on
    ``log P - log c``, and computed so: no ratio over- or underflows.

    Args:
        scores: ``f.v / T``, own candidate first, ``(B, 1 + m)``.
        log_z: ``ln Z``, ``()``; see ``nce_log_z``.
        size: number of images N that the noise is drawn from.
    """
    share = (scores.shape[1] - 1) / size
    logits = full(scores) - full(log_z) - math.log(share + NCE_EPS)  # (B, 1 + m)
    own, noise = -F.logsigmoid(logits[:, 0]), -F.logsigmoid(-logits[:, 1:])
    # The official code adds 1e-7 below the fraction bar only.
    return (own + noise.sum(1)).mean() + noise.shape[1] * math.log1p(NCE_EPS / share)


@torch.no_grad()
def nce_log_z(scores: Tensor, log_z: Tensor, size: int) -> Tensor:
    """``ln Z`` for ``nce``: ``log_z`` where it is set, else (at 0) estimated as ``N * mean(exp(scores))``.

    The mean is over positives and negatives of the first batch ever, on all ranks (InstDisc, eq. 8). Z then
    stays: the owner keeps it in a buffer, and so in the checkpoint. A logarithm, for half precision holds no Z.

    Scores reach ``1 / T``, whose exponential float32 does not hold below a temperature of 0.0113: where the largest is
    far from 0, it is taken out before and put back after the logarithm.
    """
    scores = full(scores)
    largest = scores.max()
    shift = torch.where(largest.abs() > 50, largest, 0.0)
    mine = (scores - shift).exp().mean().log() + shift
    estimate = all_gather(mine[None]).logsumexp(0) - math.log(world()) + math.log(size)
    return torch.where(log_z != 0, log_z, estimate.to(log_z.dtype))


def nce_at_chance(negatives: int) -> float:
    """The least ``nce`` of scores that tell nothing apart, each being the true one with probability 1 / (1 + m)."""
    return math.log(1 + negatives) + negatives * math.log1p(1 / negatives)


def swapped_cross_entropy(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Predict what one view is assigned to from each other view (SwAV, eq. 1; DINO, eq. 3).

    The mean over the ``A * (V - 1)`` pairs ``i != v`` of ``-sum_k targets[i] * log_softmax(scores[v] / T)``.

    Args:
        scores: of all views, ``(V, B, K)``.
        targets: distributions over K of the first A views, ``(A, B, K)``, without a gradient.
        temperature: T.
    """
    scores, targets = full(scores), full(targets)
    together = targets.sum(0)  # cross entropy is linear in its target: a view meets all of its own at once
    losses = [
        F.cross_entropy(s / temperature, together - targets[v] if v < len(targets) else together)
        for v, s in enumerate(scores)
    ]
    return torch.stack(losses).sum() / (len(targets) * (len(scores) - 1))


def over_pairs(
    loss: Callable[[Tensor, Tensor], Tensor], predictions: Sequence[Tensor], targets: Sequence[Tensor]
) -> Tensor:
    """The mean of ``loss(p, t)`` over each view's prediction and the target of each other view.

    Targets belong to the first (full) views, predictions to all: with V predictions and 2 targets the mean is over
    ``2 * (V - 1)`` pairs, as SwAV and DINO average over their crops.
    """
    terms = [loss(p, t) for j, t in enumerate(targets) for i, p in enumerate(predictions) if i != j]
    return torch.stack(terms).mean()
