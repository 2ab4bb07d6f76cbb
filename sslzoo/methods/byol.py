"""BYOL: Bootstrap Your Own Latent (Grill et al. 2020, arXiv 2006.07733), and BYOL works even without batch
statistics (Richemond et al. 2020, arXiv 2010.10241).
"""

import torch
from torch import Tensor

from sslzoo.blocks import EMA, MLP, Encoder
from sslzoo.blocks.crops import at_least_two, full_views
from sslzoo.blocks.norm import group_norm_weight_standardisation
from sslzoo.errors import UserError
from sslzoo.losses import over_pairs, unit
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim, cosine

NORMS = ("batch", "layer", "group", None)


class BYOL(Method):
    """A network predicts what its own trailing average says of another view; no negatives.

    ``L = |p1 - z2|^2 + |p2 - z1|^2`` with predictions p and target projections z of unit length (eq. 2).

    With more than two views, smaller ones are predictions only, and L is twice the mean over all pairs.
    The target starts as a copy of the online network; in the released code it has random weights of its own.

    Args:
        encoder: f.
        optim: the recipe's optimizer.
        dim: width of projections and predictions.
        hidden: width of the projector's and the predictor's hidden layer.
        momentum: tau of the target at the start; goes to 1 by half a cosine.
        norm: of both hidden layers: batch, layer or null; group takes the batch statistics out of the encoder as
            well: GroupNorm, and standardised weights everywhere.

    Raises:
        UserError: on another ``norm``.
    """

    sync_batchnorm = True

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        dim: int = 256,
        hidden: int = 4096,
        momentum: float = 0.996,
        norm: str | None = "batch",
    ):
        if norm not in NORMS:
            raise UserError(f"method.norm={norm} is none of batch, layer, group, null")
        kind = "batch" if norm == "group" else norm
        projector = MLP(encoder.dim, hidden, dim, norm=kind, bias=True, last_bias=False)
        predictor = MLP(dim, hidden, dim, norm=kind, bias=True, last_bias=False)
        if norm == "group":
            for part in (encoder, projector, predictor):
                group_norm_weight_standardisation(part)  # in place
            encoder.config["norm"] = "group"  # so that the backbone is built alike when it is loaded
        super().__init__(encoder, optim)
        self.projector, self.predictor = projector, predictor
        self.target = EMA(self.encoder, self.projector)
        self.momentum = momentum
        self.accumulates = norm == "group"  # else BatchNorm counts over the whole batch

    def loss(self, batch: Batch) -> Tensor:
        views = at_least_two(batch.views, "BYOL")
        # One view at a time: BatchNorm takes its statistics over one view.
        p = [unit(self.predictor(self.projector(self.encoder(x)))) for x in views]  # V x (B, d)
        with torch.no_grad():
            z = [unit(self.target(x)) for x in views[: full_views(views)]]  # F x (B, d)
        return 2 * over_pairs(distance, p, z)  # both directions are summed

    def after_step(self) -> None:
        tau = cosine(self.momentum, 1.0, self.progress)
        self.target.update(self.encoder, self.projector, momentum=tau)


def distance(p: Tensor, z: Tensor) -> Tensor:
    """Mean squared Euclidean distance of rows: ``(B, d), (B, d) -> ()``; of unit rows, ``2 - 2 cos``."""
    return (p - z).square().sum(1).mean()
