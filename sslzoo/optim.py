"""Optimizers and schedules: what a recipe says of them, LARS in its three forms, rates as pure functions."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sslzoo.errors import UserError


def cosine(start: float, end: float, t: float) -> float:
    """Half a cosine from ``start`` at t = 0 to ``end`` at t = 1."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def warmup_cosine(
    step: float, total: float, warmup: float, peak: float, end: float = 0.0, start: float = 0.0, inclusive: bool = False
) -> float:
    """Linear from ``start`` to ``peak`` over ``warmup`` steps, then half a cosine to ``end`` at ``total``.

    Steps may be iterations or fractional epochs. ``inclusive`` reaches the peak one step early, on the last step
    of the warm-up, as SwAV's and DINO's ``linspace`` does.
    """
    if step < warmup:
        return start + (peak - start) * step / (warmup - 1 if inclusive and warmup > 1 else warmup)
    return cosine(peak, end, min(1.0, (step - warmup) / (total - warmup)) if total > warmup else 1.0)


def stepwise(epoch: float, base: float, milestones: Iterable[float], gamma: float = 0.1) -> float:
    """``base`` times ``gamma`` for every milestone that has been reached (MoCo, InstDisc)."""
    return base * gamma ** sum(epoch >= milestone for milestone in milestones)


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], norm: float) -> None:
    """Scale each parameter's gradient down to ``norm`` where it is longer, on its own (DINO): in place; 0 for none."""
    if not norm:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, [*(norm / (norms + 1e-6)).clamp(max=1.0)])


def evaluated(closure: Callable | None):
    """What an optimizer's ``closure`` returns, None without one; its gradients are wanted whoever calls."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017), in the forms that methods were published with.

    With ``u = g + weight_decay * w`` and ``trust = trust_coefficient * |w| / |u|``:

    - ``classic`` (SimCLR): ``v <- momentum * v + lr * trust * u``, ``w <- w - v``.
    - ``popular`` (MoCo v3, BYOL, DINO, Barlow Twins): ``v <- momentum * v + trust * u``, ``w <- w - lr * v``.
    - ``larc`` (apex, SwAV): as ``popular`` with ``trust = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)``.

    They agree only at a constant rate. A norm of zero makes trust 1. In the first two forms tensors of at most
    one dimension are excluded from decay and adaptation; a group's ``exclude`` (True or False) overrides that.
    All parameters of a group move in a few fused operations, without a host sync.

    Args:
        params: tensors, or groups.
        lr: learning rate.
        momentum: mu.
        weight_decay: wd.
        trust_coefficient: eta.
        form: ``classic``, ``popular`` or ``larc``.
        nesterov: look ahead by one momentum step.
        adapt_after_momentum: ``popular`` as SimCLR's code has it: trust is measured on the momentum.
        clip: ``larc`` only: trust never exceeds ``1 / lr`` times itself, i.e. the rate never exceeds ``lr``.
        eps: ``larc`` only.
    """

    FORMS = ("classic", "popular", "larc")

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        form: str = "popular",
        nesterov: bool = False,
        adapt_after_momentum: bool = False,
        clip: bool = False,
        eps: float = 1e-8,
    ):
        if form not in self.FORMS:
            raise UserError(f"LARS has no form {form}: {', '.join(self.FORMS)}")
        self.form, self.nesterov, self.clip, self.eps = form, nesterov, clip, eps
        self.adapt_after_momentum = adapt_after_momentum
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "exclude": None}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns what ``closure`` returned."""
        loss = evaluated(closure)
        for group in self.param_groups:
            moved = [w for w in group["params"] if w.grad is not None]
            self._move([w for w in moved if not self._spares(w, group)], group, adapt=True)
            self._move([w for w in moved if self._spares(w, group)], group, adapt=False)
        return loss

    def _spares(self, w: Tensor, group: dict) -> bool:
        if group["exclude"] is None:
            return self.form != "larc" and w.ndim <= 1
        return group["exclude"]

    def _move(self, weights: list[Tensor], group: dict, adapt: bool) -> None:
        if not weights:
            return
        lr, mu = group["lr"], group["momentum"]
        velocity = [self._velocity(w) for w in weights]
        update = [w.grad for w in weights]
        if adapt:
            update = self._decayed(weights, update, group)
        if adapt and not self.adapt_after_momentum:
            update = torch._foreach_mul(update, self._trust(weights, update, group))
        if self.form == "classic":
            update = torch._foreach_mul(update, lr)
        torch._foreach_mul_(velocity, mu)
        torch._foreach_add_(velocity, update)
        if self.nesterov:
            update = torch._foreach_add(update, torch._foreach_mul(velocity, mu))
        else:
            update = velocity
        if adapt and self.adapt_after_momentum:
            update = torch._foreach_mul(update, self._trust(weights, update, group))
        torch._foreach_add_(weights, update, alpha=-1.0 if self.form == "classic" else -lr)

    def _velocity(self, w: Tensor) -> Tensor:
        state = self.state[w]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(w)
        return state["momentum_buffer"]

    def _decayed(self, weights: list[Tensor], grads: list[Tensor], group: dict) -> list[Tensor]:
        decay = group["weight_decay"]
        if self.form != "larc":
            return torch._foreach_add(grads, weights, alpha=decay)
        moving = (torch.stack(torch._foreach_norm(grads)) != 0) * decay  # apex decays nothing that has no gradient
        return torch._foreach_add(grads, torch._foreach_mul(weights, list(moving.to(weights[0].dtype))))

    def _trust(self, weights: list[Tensor], update: list[Tensor], group: dict) -> list[Tensor]:
        size, steps = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(update))
        if self.form == "larc":
            grads = torch.stack(torch._foreach_norm([w.grad for w in weights]))
            trust = group["trust_coefficient"] * size / (grads + group["weight_decay"] * size + self.eps)
            if self.clip:
                trust = (trust / group["lr"]).clamp(max=1.0)
            return list(torch.where((size > 0) & (grads > 0), trust, torch.ones_like(trust)))
        trust = group["trust_coefficient"] * size / steps
        return list(torch.where((size > 0) & (steps > 0), trust, torch.ones_like(trust)))


CHOICES = {
    "name": ("sgd", "adamw", "lars"),
    "lr_scaling": ("linear", "sqrt"),
    "exclude": ("none", "bias_and_norm"),
    "schedule": ("cosine", "step", "constant"),
    "lars": LARS.FORMS,
}


@dataclass
class Optim:
    """What a recipe says about its optimizer.

    Args:
        name: sgd, adamw or lars.
        lr: learning rate for ``lr_per`` images.
        batch_size: images per optimizer step over all ranks; the command line sets it from the data and trainer.
        lr_per: the batch that ``lr`` was stated for; null: ``lr`` is used as it is.
        lr_scaling: linear, or sqrt for SimCLR's ``lr * sqrt(batch)``.
        momentum: of SGD and LARS.
        betas: of AdamW.
        weight_decay: at the start; goes to ``final_weight_decay`` by half a cosine where that is given (DINO).
        exclude: none, or bias_and_norm to spare tensors of at most one dimension from decay (and LARS adaptation).
        schedule: cosine, step or constant.
        milestones: of ``step``, as fractions of the run: 120 and 160 of 200 epochs are 0.6 and 0.8.
        warmup_epochs, start_lr, final_lr: linear warm-up (of cosine and step), and where it starts and the cosine ends,
            relative to ``lr``.
        inclusive: see ``warmup_cosine``.
        per_epoch: move the rate once an epoch (MoCo, SimSiam) and not once a step.
        lars: the form of LARS, see there.
    """

    name: str = "sgd"
    lr: float = 0.03
    batch_size: int = 256
    lr_per: int | None = 256
    lr_scaling: str = "linear"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    final_weight_decay: float | None = None
    exclude: str = "none"
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    warmup_epochs: float = 0.0
    start_lr: float = 0.0
    final_lr: float = 0.0
    inclusive: bool = False
    per_epoch: bool = False
    lars: str = "popular"

    def __post_init__(self):
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"optim.{key}={getattr(self, key)} is none of {', '.join(allowed)}")

    @property
    def peak_lr(self) -> float:
        """The rate after scaling to the batch."""
        if self.lr_per is None:
            return self.lr
        return self.lr * (self.batch_size**0.5 if self.lr_scaling == "sqrt" else self.batch_size / self.lr_per)

    def lr_at(self, step: int, steps: int, steps_per_epoch: float) -> float:
        """Learning rate of optimizer step ``step`` of ``steps``."""
        if self.per_epoch:
            step, steps = int(step // steps_per_epoch), max(1, round(steps / steps_per_epoch))
            steps_per_epoch = 1
        peak = self.peak_lr
        if self.schedule == "constant":
            return peak
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if self.schedule == "step":
            ramp = self.start_lr + (1 - self.start_lr) * step / warmup if step < warmup else 1.0
            return ramp * stepwise(step / steps, peak, self.milestones)
        return warmup_cosine(step, steps, warmup, peak, peak * self.final_lr, peak * self.start_lr, self.inclusive)

    def weight_decay_at(self, progress: float) -> float:
        """Weight decay at ``progress`` from 0 to 1."""
        if self.final_weight_decay is None:
            return self.weight_decay
        return cosine(self.weight_decay, self.final_weight_decay, progress)

    def groups(self, parameters: Iterable[nn.Parameter], later: Iterable[nn.Parameter] = (), **options) -> list[dict]:
        """Trainable ``parameters`` as one group, or two where ``exclude`` spares some; ``options`` go to each.

        Those of them that are frozen at first and trained ``later`` follow in groups of their own: torch's fused SGD
        cannot begin the momentum of a part of a group when the other part has one.
        """
        later = list(later)
        apart = {id(p) for p in later}
        trained = [p for p in parameters if p.requires_grad and id(p) not in apart]
        groups = [{"params": trained, "decay": True, **options}]
        if self.exclude != "none":
            large, small = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
            groups = [{"params": large, "decay": True, **options}, {"params": small, "decay": False, **options}]
        return groups + (self.groups(later, **options) if later else [])

    def build(self, groups: list[dict]) -> Optimizer:
        """The optimizer over ``groups`` (see ``groups``), with one kernel for all parameters."""
        for group in groups:
            group["weight_decay"] = self.weight_decay if group["decay"] else 0.0
        if self.name == "adamw":
            return AdamW(groups, lr=self.peak_lr, betas=tuple(self.betas), fused=True)
        if self.name == "sgd":
            return SGD(groups, lr=self.peak_lr, momentum=self.momentum, fused=True)
        for group in groups:
            group["exclude"] = not group["decay"]
        return LARS(groups, lr=self.peak_lr, momentum=self.momentum, form=self.lars)

    def set(self, optimizer: Optimizer, step: int, steps: int, steps_per_epoch: float) -> None:
        """Write rate and weight decay of ``step`` into the optimizer's groups.

        A group with ``constant_lr`` keeps the peak rate (SimSiam's predictor), ``lr_scale`` multiplies it.
        """
        lr, decay = self.lr_at(step, steps, steps_per_epoch), self.weight_decay_at(step / steps)
        for group in optimizer.param_groups:
            group["lr"] = (self.peak_lr if group.get("constant_lr") else lr) * group.get("lr_scale", 1.0)
            group["weight_decay"] = decay if group["decay"] else 0.0
