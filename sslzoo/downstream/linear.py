"""A linear classifier on a frozen encoder: whichever way it is trained, its rate is chosen on training images.

``cached`` fits logistic regressions to features computed once; ``Heads`` trains on fresh crops in every epoch, as the
papers do. Both hold back a class-balanced part of the training images, choose a rate (and a kind of feature) by it, and
score a classifier of that rate that was trained on all training images, after its last step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from sslzoo.blocks import Encoder
from sslzoo.data.images import ImageSet
from sslzoo.data.subsets import balanced
from sslzoo.downstream.features import feature_batches, layers
from sslzoo.downstream.logistic import Rows, hits, logistic, place
from sslzoo.errors import UserError
from sslzoo.method import Batch
from sslzoo.optim import Optim, evaluated
from sslzoo.views import Clean


def held_out(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Training rows, ascending, by which the rate is chosen: ``fraction`` of each class.

    Raises:
        UserError: if ``fraction`` is none, or a class would have no image on one of the sides.
    """
    if not 0 < fraction < 1:
        raise UserError(f"task.selection={fraction} is no part of the training images; give more than 0, less than 1")
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if not 1 <= int(fraction * count + 0.5) < count:
            fix = (
                f"set it to about {max(1, count // 5) / count:.2g}" if count > 1 else "add images of it, or try one lr"
            )
            raise UserError(
                f"task.selection={fraction} of class {label} with its {count} training images is none or all; {fix}"
            )
    return balanced(labels, fraction, seed)


@dataclass
class Outcome:
    """How the classifiers of a sweep fared.

    Attributes:
        curve: a row each: ``features``, ``lr``, ``selection_top1`` (None without a choice), ``val_top1``.
        chosen: the row with the highest ``selection_top1``, of equal ones the first.
        top1, top5: whether the chosen one recognises each held-out image, ``(n,)`` bool.
    """

    curve: list[dict]
    chosen: int
    top1: np.ndarray
    top5: np.ndarray


def outcome(
    names: Sequence[tuple[str, float]], selection: Sequence[float] | None, scored: Sequence[tuple[np.ndarray, ...]]
) -> Outcome:
    """The classifiers ``names`` (kind, rate), their accuracy on the choosing part, and their hits on held-out images.

    Raises:
        UserError: if there was a choice and no classifier is better than nothing, so that all diverged.
    """
    if selection is not None and not max(selection) > 0:
        raise UserError("no rate of task.lrs learnt anything: all diverged, or images and backbone do not go together")
    chosen = 0 if selection is None else int(np.argmax(selection))
    chances = [None] * len(names) if selection is None else map(float, selection)
    curve = [
        {"features": kind, "lr": lr, "selection_top1": chance, "val_top1": float(top1.mean())}
        for (kind, lr), chance, (top1, _) in zip(names, chances, scored, strict=True)
    ]
    return Outcome(curve, chosen, *scored[chosen])


def cached(
    train: dict[str, np.ndarray],
    labels: np.ndarray,
    val: dict[str, np.ndarray],
    val_labels: np.ndarray,
    strengths: Sequence[float],
    selection: float = 0.1,
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """Logistic regressions on features, one for each kind and strength of L2 regularisation; see ``logistic``.

    Args:
        train, val: features ``{kind: (n, D_kind)}``.
        labels, val_labels: ``(n,)`` int64, from 0.
        strengths: the "rates" of this protocol.
        selection: part of each class to choose by; without a choice it is not used.
        seed: of that part.
        device: where to compute.
    """
    classes = int(labels.max()) + 1
    names = [(kind, strength) for kind in train for strength in strengths]
    held = held_out(labels, selection, seed) if len(names) > 1 else None
    chances, scored = [], []
    for kind, z in train.items():
        heads: list = []
        if held is not None:
            heads = logistic(Rows(z, labels, np.setdiff1d(np.arange(len(z)), held), device), classes, strengths)
            chances += [hits(head, Rows(z, labels, held, device))[0].mean() for head in heads]
        heads = logistic(Rows(z, labels, None, device), classes, strengths, heads)
        scored += [hits(head, Rows(val[kind], val_labels, None, device)) for head in heads]
    return outcome(names, chances or None, scored)


class HeadSGD(Optimizer):
    """torch's SGD with momentum, at a rate of its own for each column: ``w[:, c] -= lr * rates[c] * v[:, c]``."""

    def __init__(self, params, rates: Tensor, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False):
        self.rates = rates
        settings = {"lr": 1.0, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns what ``closure`` returned."""
        loss = evaluated(closure)
        for group in self.param_groups:
            mu = group["momentum"]
            for w in group["params"]:
                u = w.grad.add(w, alpha=group["weight_decay"])
                v = self.state[w]["momentum_buffer"] = (
                    self.state[w]["momentum_buffer"].mul_(mu).add_(u) if self.state[w] else u.clone()
                )
                w.sub_((u.add(v, alpha=mu) if group["nesterov"] else v) * (group["lr"] * self.rates.to(w.device)))
        return loss


class Heads(pl.LightningModule):
    """Linear classifiers on a frozen encoder in eval mode, one for each kind of feature and rate, trained in one pass.

    The classifiers of a kind lie side by side in one matrix, so that a step is one product however many there are. Each
    has a twin that is not shown the images ``held`` back: by the twins the rate is chosen, and no second run is needed
    for a classifier of that rate that has seen all images.

    Args:
        encoder: the backbone.
        dims: width of each kind of feature, ``{kind: D_kind}``.
        classes: C.
        lrs: learning rates for batches of ``optim.lr_per``.
        optim: schedule, momentum, weight decay and batch size; its ``lr`` is multiplied by each of ``lrs``.
        held: ``(N,)`` bool, training images that the twins are not shown; None: no twins, as there is no choice.
        nesterov: momentum that looks ahead.
        seed: of the initial weights, normal with deviation 0.01 and equal for all heads (MoCo's code).

    Attributes:
        losses: each classifier's mean loss on the last batch, ``{kind: (T, R)}``, with T = 2 with twins (they come
            last), else 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        dims: dict[str, int],
        classes: int,
        lrs: Sequence[float],
        optim: Optim,
        held: np.ndarray | None = None,
        nesterov: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.kinds, self.classes, self.lrs = tuple(dims), classes, list(lrs)
        self.optim, self.nesterov = optim, nesterov
        self.twins = 1 if held is None else 2
        self.register_buffer("held", None if held is None else torch.from_numpy(held), persistent=False)
        copies = self.twins * len(lrs)
        drawn = torch.Generator().manual_seed(seed)
        weights = {kind: 0.01 * torch.randn(dim, classes, generator=drawn) for kind, dim in dims.items()}
        self.weight = nn.ParameterDict({kind: nn.Parameter(w.repeat(1, copies)) for kind, w in weights.items()})
        self.bias = nn.ParameterDict({kind: nn.Parameter(torch.zeros(copies * classes)) for kind in dims})
        self.losses: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Heads":
        """The encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    def scores(self, kind: str, h: Tensor) -> Tensor:
        """Of all classifiers of a kind: ``(B, D) -> (T, R, B, C)``."""
        with torch.autocast(h.device.type, enabled=False):
            flat = torch.addmm(self.bias[kind], h.float(), self.weight[kind])  # (B, T * R * C)
        return flat.view(len(h), self.twins, len(self.lrs), self.classes).permute(1, 2, 0, 3)

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        with torch.no_grad():
            h = layers(self.encoder, batch.views[0], self.kinds)
        seen = torch.ones(self.twins, 1, len(batch.label), device=batch.label.device)  # (T, 1, B)
        if self.held is not None:
            seen[1] = (~self.held[batch.index]).float()
        total = seen.new_zeros(())
        for kind in self.kinds:
            scores = self.scores(kind, h[kind])
            labels = batch.label.expand(scores.shape[:3])
            each = cross_entropy(scores.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
            loss = (each * seen).sum(2) / seen.sum(2).clamp(min=1)  # (T, R)
            self.losses[kind] = loss.detach()
            total = total + loss.sum()  # none has a parameter in common with another
        return total

    def configure_optimizers(self) -> Optimizer:
        rates = torch.tensor(self.lrs).repeat(self.twins).repeat_interleave(self.classes)
        settings = {"momentum": self.optim.momentum, "weight_decay": self.optim.weight_decay, "nesterov": self.nesterov}
        return HeadSGD([*self.weight.values(), *self.bias.values()], rates, **settings)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        lr = self.optim.lr_at(self.trainer.global_step, self.steps, self.trainer.num_training_batches)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def places(
        self, images: ImageSet, clean: Clean, rows: np.ndarray | None = None, on_error: str = "raise"
    ) -> dict[str, np.ndarray]:
        """How many classes each classifier puts before the true one, without augmentation: ``{kind: (T, R, n)}``."""
        found: dict[str, list[Tensor]] = {kind: [] for kind in self.kinds}
        for h, part in feature_batches(self.encoder, images, clean, self.kinds, rows, on_error=on_error):
            labels = torch.from_numpy(images.labels[part]).to(self.device)
            for kind in self.kinds:
                found[kind].append(place(self.scores(kind, h[kind]), labels).cpu())
        return {kind: torch.cat(parts, -1).numpy() for kind, parts in found.items()}

    def outcome(self, train: ImageSet, val: ImageSet, clean: Clean, on_error: str = "raise") -> Outcome:
        """Which rate the held-back training images choose, and how all classifiers fare on ``val``."""
        names = [(kind, lr) for kind in self.kinds for lr in self.lrs]
        chances = None
        if self.held is not None:
            held = torch.nonzero(self.held).flatten().cpu().numpy()
            places = self.places(train, clean, held, on_error)
            chances = np.concatenate([(places[kind][1] == 0).mean(-1) for kind in self.kinds])
        places = self.places(val, clean, on_error=on_error)
        scored = [(each < 1, each < 5) for kind in self.kinds for each in places[kind][0]]
        return outcome(names, chances, scored)
