"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (Chen, Xie and He 2021,
arXiv 2104.02057).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sslzoo.blocks import EMA, MLP, Encoder
from sslzoo.blocks.crops import at_least_two, full_views
from sslzoo.blocks.vit import prepare_vit
from sslzoo.dist import all_gather, rank
from sslzoo.errors import UserError
from sslzoo.losses import full, over_pairs, unit
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim, cosine

HEADS = ("resnet", "vit")


class MoCoV3(Method):
    """A prediction of one view must find the other view's key among the keys of the batch; both ways, no queue.

    ``L = ctr(q1, k2) + ctr(q2, k1)``, ``ctr(q, k) = -2T log exp(q.k+ / T) / sum_n exp(q.k_n / T)``, n over all ranks
    (alg. 1).

    With more than two views, smaller ones are queries only, and L is twice the mean over all pairs.

    Args:
        encoder: f.
        optim: the recipe's optimizer.
        dim: width of queries and keys.
        hidden: width of the projector's and the predictor's hidden layers.
        head: ``resnet``, two layers each; or ``vit``, three in the projector and BatchNorm after the predictor.
        temperature: T.
        momentum: of the key encoder at the start; goes to 1 by half a cosine.
        frozen_patches: give a timm ViT fixed positions and a frozen random patch projection (sec. 4.2), and the
            paper's initial weights.

    Raises:
        UserError: on another ``head``, or if ``frozen_patches`` finds no timm ViT or one with a convolutional stem.
    """

    accumulates = False  # the images of a batch are each other's negatives
    sync_batchnorm = True

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        dim: int = 256,
        hidden: int = 4096,
        head: str = "resnet",
        temperature: float = 1.0,
        momentum: float = 0.99,
        frozen_patches: bool = False,
    ):
        super().__init__(encoder, optim)
        if head not in HEADS:
            raise UserError(f"method.head={head} is none of {', '.join(HEADS)}")
        if frozen_patches:
            prepare_vit(encoder.net)
        vit = head == "vit"
        widths = [hidden] * (2 if vit else 1)
        self.projector = MLP(encoder.dim, *widths, dim, norm="batch", last_norm="batch_no_affine")
        last_norm = "batch_no_affine" if vit else None
        self.predictor = MLP(dim, hidden, dim, norm="batch", last_norm=last_norm, last_bias=False)
        self.target = EMA(self.encoder, self.projector)
        self.temperature, self.momentum = temperature, momentum

    def loss(self, batch: Batch) -> Tensor:
        views = at_least_two(batch.views, "MoCo v3")
        # One view at a time: BatchNorm takes its statistics over one view.
        q = [unit(self.predictor(self.projector(self.encoder(x)))) for x in views]  # V x (B, d)
        with torch.no_grad():
            k = [unit(self.target(x)) for x in views[: full_views(views)]]  # F x (B, d)
        return 2 * over_pairs(self.contrast, q, k)  # both ways are summed

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        """``ctr(q, k)`` of unit rows ``(B, d)``; the keys of all ranks, without a gradient, are the candidates."""
        with torch.autocast(q.device.type, enabled=False):
            logits = full(q) @ all_gather(full(k)).T / self.temperature  # (B, W * B)
        own = torch.arange(len(q), device=q.device) + rank() * len(q)
        return 2 * self.temperature * F.cross_entropy(logits, own)

    def after_step(self) -> None:
        # The released code moves the key encoder at the start of a step, with the weights and momentum of then:
        # the moment between two steps, and here the momentum of the coming one.
        momentum = cosine(self.momentum, 1.0, min(1.0, (self.step + 1) / self.steps))
        self.target.update(self.encoder, self.projector, momentum=momentum)

    def loss_at_chance(self) -> float:
        """All logits equal: ``4T ln B`` with B over all ranks."""
        return 4 * self.temperature * math.log(self.optim.batch_size)
