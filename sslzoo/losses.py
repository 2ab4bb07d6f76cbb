"""Losses that two methods share, as pure functions on ``(B, d)`` tensors of any float dtype.

Half-precision inputs are computed in float32: a temperature of 0.07 turns bfloat16's rounding of a cosine into
errors of the size of the loss. Inputs are taken as they are; the caller normalises.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sslzoo.dist import all_gather_with_grad, rank


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
        positive = (q * k).sum(1) / temperature  # (B,)
        negative = (q @ negatives.T / temperature).logsumexp(1)  # (B,)
        return (torch.logaddexp(positive, negative) - positive).mean()


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (SimCLR, eq. 1), the mean over 2B anchors.

    A view is told from the 2WB - 2 views of other images on all ranks; gradients reach all ranks. The official
    code's value is the sum of its two halves, twice this mean.

    Args:
        z1, z2: projections of the two views, ``(B, d)`` each.
        temperature: T.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = full(z1), full(z2)
        anchors = torch.cat([z1, z2])  # (2B, d)
        g1, g2 = all_gather_with_grad(z1), all_gather_with_grad(z2)
        own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
        twin = torch.cat([own + len(g1), own])
        logits = anchors @ torch.cat([g1, g2]).T / temperature  # (2B, 2WB)
        itself = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, torch.cat([own, own + len(g1)])[:, None], True)
        return F.cross_entropy(logits.masked_fill(itself, float("-inf")), twin)
