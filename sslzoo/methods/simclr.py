"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al. 2020, arXiv 2002.05709),
and v2: Big Self-Supervised Models are Strong Semi-Supervised Learners (Chen et al. 2020, arXiv 2006.10029).
"""

import math
from itertools import combinations

import torch
from torch import Tensor, nn

from sslzoo.blocks import EMA, MLP, Encoder
from sslzoo.blocks.crops import at_least_two, by_resolution, full_views
from sslzoo.errors import UserError
from sslzoo.losses import nt_xent, unit
from sslzoo.memory import Queue
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim


class SimCLR(Method):
    """Each view of an image must find the other among the views of all images in a large batch.

    ``L = -log exp(z_i.z_j / T) / sum_{k != i} exp(z_i.z_k / T)``, the mean over 2B anchors i with twin j (eq. 1).

    With more than two views, the mean of L over all pairs that have at least one full view in them.

    Args:
        encoder: f.
        optim: the recipe's optimizer.
        dim: width of projections.
        layers: of the projector, 2 in v1 and 3 in v2; hidden ones are as wide as the encoder.
        temperature: T.
        queue_size: K more negatives from a memory of past projections (v2, sec. 2; not in the released code), or 0.
        momentum: of the network that fills the memory.

    Raises:
        UserError: if ``layers`` is less than 1.
    """

    accumulates = False  # the images of a batch are each other's negatives
    sync_batchnorm = True

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        dim: int = 128,
        layers: int = 2,
        temperature: float = 0.1,
        queue_size: int = 0,
        momentum: float = 0.999,
    ):
        super().__init__(encoder, optim)
        if layers < 1:
            raise UserError(f"method.layers={layers} leaves no projector; set it to 2 (v1) or 3 (v2)")
        self.projector = MLP(*[encoder.dim] * layers, dim, norm="batch", last_norm="batch_no_beta")
        self.target = EMA(self.encoder, self.projector) if queue_size else None
        self.queue = Queue(queue_size, dim) if queue_size else None
        self.temperature, self.momentum = temperature, momentum
        self.fresh: list[Tensor] = []  # keys of this optimizer step, not yet in the queue

    def loss(self, batch: Batch) -> Tensor:
        views = at_least_two(batch.views, "SimCLR")
        h = by_resolution(self.encoder, views)  # (V * B, D), BatchNorm over both views
        z = unit(self.projector(h)).chunk(len(views))  # V x (B, d)
        negatives = self.remembered(views[1])  # (K, d) or None
        pairs = [(z[i], z[j]) for i, j in combinations(range(len(z)), 2) if i < full_views(views)]
        return torch.stack([nt_xent(z1, z2, self.temperature, negatives) for z1, z2 in pairs]).mean()

    def check(self, batch_size: int) -> None:
        """Refuse a global batch that the memory does not hold."""
        if self.queue is not None:
            self.queue.check(batch_size)

    @torch.no_grad()
    def remembered(self, x: Tensor) -> Tensor | None:
        """Negatives from the memory, ``(K, d)``; notes the keys of ``x`` ``(B, 3, H, W)`` for later steps."""
        if self.queue is None or self.target is None:
            return None
        self.fresh.append(unit(self.target(x)))  # (B, d)
        return self.queue.keys

    def after_step(self) -> None:
        if self.queue is None or self.target is None:
            return
        for k in self.fresh:
            self.queue.push(k)
        self.fresh.clear()
        self.target.update(self.encoder, self.projector, momentum=self.momentum)

    def up_to_layer(self, layer: int = 1) -> nn.Sequential:
        """Encoder and the first ``layer`` layers of the projector with their norm and ReLU: ``(B, 3, H, W) -> (B, D)``.

        v2 fine-tunes from ``layer=1`` (sec. 2); 0 is the encoder alone. Shares its weights with this method.
        """
        return nn.Sequential(self.encoder, *[*self.projector][: 3 * layer])

    @property
    def kept_projector(self) -> nn.Sequential | None:
        """The first layer, where it is not the last: ``(B, D) -> (B, D)``."""
        return nn.Sequential(*[*self.projector][:3]) if len(self.projector) > 3 else None

    def loss_at_chance(self) -> float:
        """All logits equal: ``ln(2B - 1 + K)`` with B over all ranks."""
        return math.log(2 * self.optim.batch_size - 1 + (0 if self.queue is None else len(self.queue.keys)))
