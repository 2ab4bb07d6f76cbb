"""Distillation: a student learns what a teacher says of images that need no labels.

SimCLR v2's third stage (Chen et al. 2020, arXiv 2006.10029, sec. 2), knowledge distillation (Hinton et al. 2015,
arXiv 1503.02531) and contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from sslzoo.blocks import MLP, Encoder
from sslzoo.checkpoints.classifier import Tuned
from sslzoo.dist import all_sum, world
from sslzoo.downstream.base import Downstream
from sslzoo.downstream.finetune import classifier
from sslzoo.errors import UserError
from sslzoo.losses import candidate_scores, full, nce, nce_log_z, unit
from sslzoo.memory import Bank
from sslzoo.method import Batch
from sslzoo.optim import Optim

LOSSES = ("soft", "kd", "crd")


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """SimCLR v2's: ``-T^2 sum_y softmax(t / T) log softmax(s / T)``, the mean over images.

    The factor ``T^2`` is the released code's; the paper (eq. 2) has none, and T = 1.

    Args:
        student, teacher: logits, ``(B, C)`` each; the teacher's without a gradient.
        temperature: T.
    """
    student, teacher = full(student), full(teacher)
    return temperature**2 * cross_entropy(student / temperature, (teacher / temperature).softmax(1))


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton's: ``T^2 KL(softmax(t / T) || softmax(s / T))``, the mean over images; ``(B, C)`` logits.

    ``soft_loss`` less the teacher's entropy: the same gradient, and zero where both agree.
    """
    student, teacher = full(student) / temperature, full(teacher) / temperature
    difference = kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    return temperature**2 * difference


def crd_loss(
    z_s: Tensor,
    z_t: Tensor,
    rows_s: Tensor,
    rows_t: Tensor,
    log_z: tuple[Tensor, Tensor],
    size: int,
    temperature: float,
) -> Tensor:
    """CRD (eq. 11, 17): tell each image's own pair of features from pairs of different images, both ways.

    Args:
        z_s, z_t: unit features of student and teacher, ``(B, d)``.
        rows_s, rows_t: remembered features of the same images, own first, ``(B, 1 + m, d)``.
        log_z: ``ln Z`` of the student's and the teacher's features as anchors, see ``nce_log_z``.
        size: number of images N that are remembered.
        temperature: T.
    """
    student = nce(candidate_scores(z_s, rows_t, temperature), log_z[0], size)
    teacher = nce(candidate_scores(z_t, rows_s, temperature), log_z[1], size)
    return student + teacher


class Contrast(nn.Module):
    """CRD's own parameters and memory: an embedding of each side's features, and a bank of each.

    Negatives are any images, as the released code has it without labels (with them: images of other classes).

    Args:
        dim_s, dim_t: widths of the features.
        size: N, number of training images.
        dim: d.
        negatives: m.
        temperature: T.
        momentum: of the banks.
    """

    def __init__(
        self,
        dim_s: int,
        dim_t: int,
        size: int,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ):
        super().__init__()
        self.embed_s, self.embed_t = MLP(dim_s, dim), MLP(dim_t, dim)
        self.bank_s, self.bank_t = Bank(size, dim, momentum), Bank(size, dim, momentum)
        self.size, self.negatives, self.temperature = size, negatives, temperature
        self.register_buffer("log_z", torch.zeros(2))  # 0: not yet estimated
        self.fresh: list[tuple[Tensor, Tensor, Tensor]] = []  # indices and features of this optimizer step

    def forward(self, h_s: Tensor, h_t: Tensor, index: Tensor) -> Tensor:
        """The loss of features ``(B, D)`` of the images ``index`` (B,)."""
        z_s, z_t = unit(self.embed_s(h_s)), unit(self.embed_t(h_t))
        drawn = self.bank_s.sample(index, self.negatives)  # (B, 1 + m), the same images for both
        rows_s, rows_t = self.bank_s.slots[drawn], self.bank_t.slots[drawn]
        with torch.no_grad():
            for i, (z, rows) in enumerate(((z_s, rows_t), (z_t, rows_s))):
                scores = candidate_scores(z, rows, self.temperature)
                self.log_z[i] = nce_log_z(scores, self.log_z[i], self.size)
        self.fresh.append((index, z_s.detach(), z_t.detach()))
        return crd_loss(z_s, z_t, rows_s, rows_t, tuple(self.log_z.unbind()), self.size, self.temperature)

    def update(self) -> None:
        """Move the slots of this step's images: the loss has seen those of the last visit."""
        index, z_s, z_t = (torch.cat(parts) for parts in zip(*self.fresh, strict=True))
        self.bank_s.update(index, z_s)
        self.bank_t.update(index, z_t)
        self.fresh.clear()


class Distill(Downstream):
    """``(1 - w) L(student, teacher) + w CE(student, label)``, the second over labelled images (SimCLR v2, eq. 3).

    L is ``soft_loss``, ``kd_loss``, or for ``crd`` what its README advises: ``kd_loss`` with 0.8 of ``crd_loss``, which
    alone teaches the encoder but no classifier.

    Args:
        encoder: of the student.
        teacher: what a fine-tuning run left.
        optim: the optimizer.
        loss: soft, kd or crd.
        temperature: of the logits.
        labelled_weight: w, 0 to 1.
        crd_weight: of ``crd_loss`` beside ``kd_loss``.
        size: N, number of training images; for ``crd``.
        dim, negatives: of ``crd``, see ``Contrast``.

    Raises:
        UserError: on a loss that does not exist, or a temperature, weight or number of negatives out of range.
    """

    def __init__(
        self,
        encoder: Encoder,
        teacher: Tuned,
        optim: Optim | None = None,
        loss: str = "soft",
        temperature: float = 1.0,
        labelled_weight: float = 0.0,
        crd_weight: float = 0.8,
        size: int | None = None,
        dim: int = 128,
        negatives: int = 16384,
    ):
        super().__init__(encoder, optim)
        if loss not in LOSSES:
            raise UserError(f"task.loss={loss} is none of {', '.join(LOSSES)}")
        if temperature <= 0:
            raise UserError(f"task.temperature={temperature} divides logits; give more than 0, e.g. 1 (soft) or 4 (kd)")
        if not 0 <= labelled_weight <= 1:
            raise UserError(f"task.labelled_weight={labelled_weight} is no share of the loss; give 0 to 1")
        self.classifier = classifier(encoder.dim, len(teacher.classes))
        self.teacher = teacher.requires_grad_(False)
        self.contrast = None
        if loss == "crd":
            if size is None or negatives < 1:
                raise UserError(f"task.negatives={negatives} of {size} images does not work; give at least 1")
            self.contrast = Contrast(encoder.dim, teacher.classifier.in_features, size, dim, negatives)
        self.kind, self.temperature = loss, temperature
        self.labelled_weight, self.crd_weight = labelled_weight, crd_weight
        self.train()

    def train(self, mode: bool = True) -> "Distill":
        """As any module's; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))

    def loss(self, batch: Batch) -> Tensor:
        (x,) = batch.views
        with torch.no_grad():
            h_t = self.teacher.features(x)  # (B, D_t)
            told = self.teacher.classifier(h_t)  # (B, C)
        h_s = self.encoder(x)  # (B, D_s)
        said = self.classifier(h_s)  # (B, C)
        weight = self.labelled_weight
        loss = (1 - weight) * self.distance(said, told, h_s, h_t, batch.index)
        if weight:
            # A rank's images weigh as much as those of others, however many of them have labels.
            known = all_sum((batch.label >= 0).sum()).clamp(min=1)
            labelled = cross_entropy(full(said), batch.label, ignore_index=-1, reduction="sum")
            loss = loss + weight * labelled * world() / known
        return loss

    def distance(self, said: Tensor, told: Tensor, h_s: Tensor, h_t: Tensor, index: Tensor) -> Tensor:
        """From the teacher: of logits ``(B, C)`` each, and for ``crd`` of features ``(B, D)`` each."""
        if self.contrast is None:
            return {"soft": soft_loss, "kd": kd_loss}[self.kind](said, told, self.temperature)
        return kd_loss(said, told, self.temperature) + self.crd_weight * self.contrast(h_s, h_t, index)

    def after_step(self) -> None:
        if self.contrast is not None:
            self.contrast.update()
