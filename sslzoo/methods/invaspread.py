"""InvaSpread: Unsupervised Embedding Learning via Invariant and Spreading Instance Feature (Ye et al. 2019,
arXiv 1904.03436).
"""

import math
from itertools import combinations

import torch
from torch import Tensor

from sslzoo.blocks import MLP, Encoder
from sslzoo.blocks.crops import at_least_two, by_resolution, full_views
from sslzoo.dist import all_gather, rank
from sslzoo.losses import full, unit
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim


class InvaSpread(Method):
    """In one batch, a view must be recognised as its twin, and no other view as it: invariant, and spread out.

    ``L = -(1 / 2B) sum_i [log P_i,twin + sum_{j not i, twin} log(1 - P_ij)]``, P_i the softmax of view i's
    similarities to all other views (eq. 6), which enter as constants.

    With more than two views, the mean of L over all pairs that have at least one full view in them.

    Args:
        encoder: f.
        optim: the recipe's optimizer.
        dim: width of embeddings.
        temperature: T.
        negative_weight: how much other images weigh in the softmax and in the sum, against the twin.
    """

    accumulates = False  # negatives are the batch
    sync_batchnorm = True  # trained on one GPU

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        dim: int = 128,
        temperature: float = 0.1,
        negative_weight: float = 1.0,
    ):
        super().__init__(encoder, optim)
        self.projector = MLP(encoder.dim, dim)
        self.temperature, self.negative_weight = temperature, negative_weight

    def loss(self, batch: Batch) -> Tensor:
        views = at_least_two(batch.views, "InvaSpread")
        h = by_resolution(self.encoder, views)  # (V * B, D), BatchNorm over both views, as in the official code
        z = unit(self.projector(h)).chunk(len(views))  # V x (B, d)
        pairs = [(z[i], z[j]) for i, j in combinations(range(len(z)), 2) if i < full_views(views)]
        return torch.stack([invaspread(*pair, self.temperature, self.negative_weight) for pair in pairs]).mean()


def invaspread(z1: Tensor, z2: Tensor, temperature: float, negative_weight: float = 1.0) -> Tensor:
    """InvaSpread's batch criterion: the mean over this rank's 2B views, compared with those of all ranks.

    An anchor's gradient takes what it is compared with as constant, so gathering carries none.

    Args:
        z1, z2: unit embeddings of the two views, ``(B, d)`` each.
        temperature: T.
        negative_weight: m; the softmax over m times each negative, and m times the sum over negatives.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = full(z1), full(z2)
        others = torch.cat([all_gather(z1), all_gather(z2)])  # (2WB, d)
        own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
        me = torch.cat([own, own + len(others) // 2])[:, None]  # (2B, 1), this rank's columns
        twin = me.roll(len(z1), 0)
        scores = torch.cat([z1, z2]) @ others.T / temperature  # (2B, 2WB)
        scores = scores.scatter(1, me, float("-inf"))
        positive = scores.gather(1, twin)
        negatives = scores.scatter(1, twin, float("-inf"))
        log_sum = (negatives.logsumexp(1, keepdim=True) + math.log(negative_weight)).logaddexp(positive)
        # 1 - P is at least a rounding error: one image alike and all others far apart must not be infinitely bad.
        spread = (-torch.expm1(negatives - log_sum)).clamp(min=torch.finfo(scores.dtype).eps).log().sum(1)
        return -((positive - log_sum).squeeze(1) + negative_weight * spread).mean()
