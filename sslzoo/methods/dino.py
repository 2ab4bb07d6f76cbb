"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al. 2021, arXiv 2104.14294)."""

import math

import torch
from timm.layers import DropPath
from torch import Tensor

from sslzoo.blocks import EMA, Encoder
from sslzoo.blocks.crops import at_least_two, by_resolution
from sslzoo.blocks.heads import DINOHead
from sslzoo.blocks.norm import has_batchnorm
from sslzoo.dist import all_mean
from sslzoo.losses import full, swapped_cross_entropy
from sslzoo.method import Batch, Method
from sslzoo.optim import Optim, clip_each, cosine, warmup_cosine

GLOBAL = 2  # views that the teacher sees: the large ones, which come first


class DINO(Method):
    """A student of all crops must say what its own trailing average says of the two large ones.

    ``L = mean over i in {0, 1}, v != i of -P_t(x_i) log P_s(x_v)``, ``P_s = softmax(s / T_s)``, ``P_t =
    softmax((t - c) / T_t)``. The center c keeps one output from winning always, the low T_t all from being alike
    (eq. 3, 4). Stochastic depth is the student's alone: ``encoder.options.drop_path_rate``, 0.1 in the paper's ViTs.

    Args:
        encoder: f; runs once per resolution.
        optim: the recipe's optimizer; ``final_weight_decay`` is where the decay goes.
        hidden, bottleneck, out_dim: widths of the projector's hidden layers, of its unit-length output, and K.
        use_bn: BatchNorm in the projector.
        norm_last_layer: keep the last layer's rows at length one; false lets them learn it.
        student_temperature, teacher_temperature: T_s, and T_t once warm.
        warmup_teacher_temperature, warmup_teacher_epochs: T_t in the first epoch; over so many it grows linearly.
        center_momentum, momentum: of c; of the teacher at the start, which grows to 1 by half a cosine.
        clip: greatest norm of each parameter's gradient, on its own; 0 for none.
        freeze_last_layer: epochs at the start in which the last layer receives no gradient.

    Raises:
        UserError: if an image has fewer than two views.
    """

    sync_batchnorm = True
    center: Tensor

    def __init__(
        self,
        encoder: Encoder,
        optim: Optim | None = None,
        hidden: int = 2048,
        bottleneck: int = 256,
        out_dim: int = 65536,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_epochs: int = 0,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        clip: float = 3.0,
        freeze_last_layer: int = 1,
    ):
        super().__init__(encoder, optim)
        self.projector = DINOHead(encoder.dim, hidden, bottleneck, out_dim, use_bn, norm_last_layer)
        self.target = EMA(self.encoder, self.projector)
        for part in (module for module in self.target.modules() if isinstance(module, DropPath)):
            part.drop_prob = 0.0  # not by eval(): the teacher's BatchNorm takes statistics of its own batches
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.warmup_teacher_temperature, self.warmup_teacher_epochs = warmup_teacher_temperature, warmup_teacher_epochs
        self.center_momentum, self.momentum = center_momentum, momentum
        self.clip, self.freeze_last_layer = clip, freeze_last_layer
        self.accumulates = not has_batchnorm(self)  # it counts over the whole batch
        self.fresh: list[Tensor] = []  # mean teacher outputs of this optimizer step, not yet in the center

    def loss(self, batch: Batch) -> Tensor:
        views = at_least_two(batch.views, "DINO")
        with torch.no_grad():
            t = by_resolution(self.target, views[:GLOBAL])  # (2 * B, K)
        s = self.projector(by_resolution(self.encoder, views))  # (V * B, K), BatchNorm over all crops
        return self.distillation(s, t)

    def distillation(self, s: Tensor, t: Tensor) -> Tensor:
        """The loss of student outputs ``(V * B, K)`` under teacher outputs ``(2 * B, K)``, both crop-major."""
        t, batch = full(t), len(t) // GLOBAL
        self.fresh.append(t.mean(0, keepdim=True))
        p = ((t - self.center) / self.temperature).softmax(1)
        return swapped_cross_entropy(s.unflatten(0, (-1, batch)), p.unflatten(0, (-1, batch)), self.student_temperature)

    @property
    def temperature(self) -> float:
        """The teacher's; it moves once an epoch."""
        start, end = self.warmup_teacher_temperature, self.teacher_temperature
        epoch, warmup = self.step * self.epochs // self.steps, self.warmup_teacher_epochs
        return warmup_cosine(epoch, self.epochs, warmup, end, end, start, inclusive=True)

    def parameter_groups(self) -> list[dict]:
        return self.optim.groups(self.parameters(), later=self.projector.last_layer.parameters())

    def before_step(self) -> None:
        clip_each(self.parameters(), self.clip)
        if self.step < self.first_step(self.freeze_last_layer):
            self.projector.last_layer.zero_grad()  # to None: neither weight decay nor moments touch it

    def after_step(self) -> None:
        # A loss is centered by what came before it, and so is each part of an accumulated batch.
        self.center.lerp_(all_mean(torch.stack(self.fresh).mean(0)).to(self.center), 1 - self.center_momentum)
        self.fresh.clear()
        self.target.update(self.encoder, self.projector, momentum=cosine(self.momentum, 1.0, self.progress))

    @property
    def backbone(self) -> Encoder:
        """The teacher's encoder, the better of the two (sec. 5.2)."""
        return self.target.copies[0]  # type: ignore[return-value]

    def loss_at_chance(self) -> float:
        """A student that says the same of every output: ``ln K``."""
        return math.log(self.center.shape[1])
