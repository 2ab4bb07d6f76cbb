"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al. 2020, arXiv 1911.05722), and
v2: Improved Baselines with Momentum Contrastive Learning (Chen et al. 2020, arXiv 2003.04297).
"""

import math

import torch
from torch import Tensor

from sslzoo.blocks import EMA, MLP, Encoder
from sslzoo.blocks.crops import at_least_two, full_views
from sslzoo.blocks.norm import group_batchnorm
from sslzoo.dist import shuffled, world
from sslzoo.errors import UserError
from sslzoo.losses import info_nce, unit
from sslzoo.memory import Queue
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim
from sslzoo.views.draw import permutation


class MoCo(Method):
    """A query must find the key of its other view among a queue of past keys, made by a slowly moving encoder.

    ``L = -log exp(q.k / T) / (exp(q.k / T) + sum_n exp(q.n / T))``, n over the queue (eq. 1).

    The first view is the query and the second gives the key. With more than two views, every full one but the first
    gives a key, all are queries, and L is the mean over all pairs of different views.

    Args:
        encoder: f.
        optim: the recipe's optimizer.
        dim: width of queries and keys.
        layers: 1, the linear head of v1, or 2, the MLP of v2; hidden layers are as wide as the encoder.
        queue_size: K.
        temperature: T.
        momentum: of the key encoder.
        symmetric: the first view gives a key too, so two views are contrasted both ways (not in the papers; one epoch
            sees twice as much).
        bn_groups: BatchNorm groups over the world's batch. The papers train on 8 GPUs, so 8 groups; one device
            reaches the same by splitting its batch. 1 disables Shuffling BN (for encoders without BatchNorm).

    Raises:
        UserError: if the batch does not fit into the queue or split into ``bn_groups``, or these into the ranks.
    """

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        dim: int = 128,
        layers: int = 1,
        queue_size: int = 65536,
        temperature: float = 0.07,
        momentum: float = 0.999,
        symmetric: bool = False,
        bn_groups: int = 8,
    ):
        super().__init__(group_batchnorm(encoder, bn_groups), optim)
        self.projector = MLP(*[encoder.dim] * layers, dim)
        self.target = EMA(self.encoder, self.projector)
        self.queue = Queue(queue_size, dim)
        self.temperature, self.momentum = temperature, momentum
        self.symmetric, self.bn_groups = symmetric, bn_groups
        self.fresh: list[Tensor] = []  # keys of this optimizer step, not yet in the queue

    def loss(self, batch: Batch) -> Tensor:
        views = at_least_two(batch.views, "MoCo")
        self.check(world() * len(views[0]))
        keyed = [*range(1, full_views(views)), *([0] if self.symmetric else [])]
        pairs = [(i, j) for j in keyed for i in range(len(views)) if i != j]
        # Keys first: no activations are held meanwhile, so their memory serves the queries next.
        k = {j: self.key(views[j]) for j in keyed}
        # One view at a time: BatchNorm takes its statistics over one view.
        q = {i: unit(self.projector(self.encoder(views[i]))) for i in sorted({i for i, _ in pairs})}  # (B, d) each
        self.fresh.extend(k.values())
        return torch.stack([info_nce(q[i], k[j], self.queue.keys, self.temperature) for i, j in pairs]).mean()

    def key(self, x: Tensor) -> Tensor:
        """Keys of a view, ``(B, 3, H, W) -> (B, d)``, so that BatchNorm cannot match them to their queries."""
        order = permutation(self.seed, self.step, world() * len(x))
        return unit(shuffled(self.target, x, order))

    def after_step(self) -> None:
        # Contrast, then push: a key is no negative of its own step, nor of another part of an accumulated batch.
        for k in self.fresh:
            self.queue.push(k)
        self.fresh.clear()
        # The papers move the key encoder before the next forward pass, with the weights of now: the same moment.
        self.target.update(self.encoder, self.projector, momentum=self.momentum)

    def check(self, batch_size: int) -> None:
        """Refuse a global batch that the queue does not hold or the groups do not divide."""
        self.queue.check(batch_size)
        groups = self.bn_groups
        if groups > 1 and (groups % world() or batch_size % groups or batch_size == groups):
            raise UserError(
                f"method.bn_groups={groups} does not split a batch of {batch_size} on {world()} device(s) evenly into"
                " groups of two or more; change data.batch_size or method.bn_groups"
            )

    def loss_at_chance(self) -> float:
        """All logits equal: ``ln(1 + K)``."""
        return math.log(1 + len(self.queue.keys))
