"""Clusters that are learned: their middles on the unit sphere, and codes that use all of them alike (SwAV)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslzoo.dist import all_gather
from sslzoo.losses import full, unit


class Prototypes(nn.Module):
    """K unit vectors, and the cosines of features with them, in at least float32: ``(..., d) -> (..., K)``.

    Args:
        dim: d, of unit features.
        count: K.
    """

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight = nn.Linear(dim, count, bias=False).weight  # (K, d)
        self.normalise()

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, full(self.weight))

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring each prototype back to length one, once an optimizer has moved it."""
        self.weight.copy_(unit(self.weight))

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, count={self.weight.shape[0]}"


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes near ``exp(scores / epsilon)`` that use all prototypes alike, ``(B, K) -> (B, K)`` (eq. 3 to 5).

    Each iteration brings the columns to equal sums over the samples of all ranks, then each row to sum 1. Taken in
    logarithms, in at least float32, scores of any size are safe; constant factors of the paper's Q cancel.

    Args:
        scores: this rank's rows.
        epsilon: how soft; a small one makes hard codes.
        iterations: at least 1.
    """
    q = full(scores) / epsilon
    for _ in range(iterations):
        q = q - all_gather(q.logsumexp(0, keepdim=True)).logsumexp(0)
        q = q.log_softmax(1)
    return q.exp()
