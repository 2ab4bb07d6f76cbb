"""SimSiam: Exploring Simple Siamese Representation Learning (Chen and He 2021, arXiv 2011.10566)."""

from torch import Tensor, nn

from sslzoo.blocks import MLP, Encoder
from sslzoo.blocks.crops import at_least_two, full_views
from sslzoo.losses import over_pairs, unit
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim


class SimSiam(Method):
    """Each view predicts the other's projection, which receives no gradient; that alone prevents collapse.

    ``L = -(cos(p1, stopgrad(z2)) + cos(p2, stopgrad(z1))) / 2`` (eq. 4).

    With more than two views, smaller ones are predictions only, and L is the mean over all pairs.

    Args:
        encoder: f.
        optim: the recipe's optimizer.
        dim: width of projections and predictions; the projector's hidden layers are as wide as the encoder.
        bottleneck: the predictor's hidden width.
        stop_gradient: false collapses (table 1).
        predictor: false collapses (table 2).
        constant_predictor_lr: keep the predictor's rate at its peak (table 2, row c).
        last_norm: after the projector: ``batch_no_affine``, ``batch`` or null (table 3).
    """

    accumulates = False  # BatchNorm counts over the whole batch
    sync_batchnorm = True

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        dim: int = 2048,
        bottleneck: int = 512,
        stop_gradient: bool = True,
        predictor: bool = True,
        constant_predictor_lr: bool = True,
        last_norm: str | None = "batch_no_affine",
    ):
        super().__init__(encoder, optim)
        self.projector = MLP(*[encoder.dim] * 3, dim, norm="batch", last_norm=last_norm, last_bias=True)
        if last_norm is not None:
            self.projector[6].bias.requires_grad_(False)  # the norm takes it away; kept for the official checkpoints
        self.predictor = MLP(dim, bottleneck, dim, norm="batch") if predictor else nn.Identity()
        self.stop_gradient, self.constant_predictor_lr = stop_gradient, constant_predictor_lr

    def loss(self, batch: Batch) -> Tensor:
        views = at_least_two(batch.views, "SimSiam")
        # One view at a time: BatchNorm takes its statistics over one view.
        z = [self.projector(self.encoder(x)) for x in views]  # V x (B, d)
        p = [self.predictor(projection) for projection in z]  # V x (B, d)
        targets = [projection.detach() if self.stop_gradient else projection for projection in z[: full_views(views)]]
        return over_pairs(negative_cosine, p, targets)

    def parameter_groups(self) -> list[dict]:
        rest = [*self.encoder.parameters(), *self.projector.parameters()]
        own = self.optim.groups(self.predictor.parameters(), constant_lr=self.constant_predictor_lr)
        return [*self.optim.groups(rest, constant_lr=False), *own]


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean of ``-cos`` over rows: ``(B, d), (B, d) -> ()``."""
    return -(unit(p) * unit(z)).sum(1).mean()
