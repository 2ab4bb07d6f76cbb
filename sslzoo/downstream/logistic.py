"""Multinomial logistic regression on features that are already there: the linear probe in minutes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslzoo.downstream.features import parts


class Head(NamedTuple):
    """A linear classifier of plain features: ``h @ weight + bias``."""

    weight: Tensor  # (D, C)
    bias: Tensor  # (C,)


class Rows:
    """Features and labels a part at a time: kept on the device, or read from the memory map they lie in.

    Args:
        z: ``(n, D)``.
        labels: ``(n,)`` int64.
        rows: which of them (default: all), ascending.
        device: where to compute.
    """

    def __init__(self, z: np.ndarray, labels: np.ndarray, rows: np.ndarray | None = None, device: str = "cpu"):
        self.rows = np.arange(len(z)) if rows is None else rows
        self.labels = torch.from_numpy(labels[self.rows]).to(device)
        self.mapped = z if isinstance(z, np.memmap) else None
        self.z = None if self.mapped is not None else torch.from_numpy(z if rows is None else z[rows]).to(device)
        self.dim, self.dtype, self.device = z.shape[1], torch.from_numpy(np.empty(0, z.dtype)).dtype, device

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields features ``(b, D)`` and labels ``(b,)``."""
        for part in parts(len(self), self.dim):
            if self.mapped is None:
                x = self.z[part]
            else:
                x = torch.from_numpy(np.asarray(self.mapped[self.rows[part]])).to(self.device)  # a copy
            yield x, self.labels[part]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each dimension, ``(D,)``; a constant dimension has deviation 1."""
        mean = sum(x.double().sum(0) for x, _ in self) / len(self)
        variance = sum((x.double() - mean).square().sum(0) for x, _ in self) / len(self)
        constant = variance <= 1e-12 * mean.square().clamp(min=1e-12)
        std = torch.where(constant, torch.ones_like(variance), variance.sqrt())
        return mean.to(self.dtype), std.to(self.dtype)


def logistic(
    rows: Rows, classes: int, strengths: Sequence[float], starts: Sequence[Head] = (), steps: int = 100
) -> list[Head]:
    """The minimum of cross-entropy + ``strength / 2 * |W|^2`` for each strength, by L-BFGS on all rows at once.

    W acts on standardised features (each dimension with mean 0 and deviation 1 on these rows), so that a strength means
    the same for every backbone and the problem is well conditioned; the bias is free. Strengths are taken from the
    largest to the smallest, each starting where the one before ended. In scikit-learn's terms
    ``C = 1 / (strength * n)``.

    Args:
        rows: features and labels.
        classes: C.
        strengths: in any order.
        starts: a head to start from for each strength, as fitted on similar rows.
        steps: of L-BFGS at most; at small strengths the classes may be separable, and the minimum far away.

    Returns:
        A head for each strength, for plain features.
    """
    mean, std = rows.moments()
    weight = torch.zeros(rows.dim + 1, classes, dtype=rows.dtype, device=rows.device)  # standardised; bias comes last
    found: dict[int, Head] = {}
    for i in sorted(range(len(strengths)), key=lambda i: -strengths[i]):
        if starts:
            weight = torch.cat([starts[i].weight * std[:, None], (starts[i].bias + mean @ starts[i].weight)[None]])
        weight = _minimum(rows, weight, mean, std, strengths[i], steps)
        plain = weight[:-1] / std[:, None]
        found[i] = Head(plain, weight[-1] - mean @ plain)
    return [found[i] for i in range(len(strengths))]


def _minimum(rows: Rows, start: Tensor, mean: Tensor, std: Tensor, strength: float, steps: int) -> Tensor:
    w = start.clone().requires_grad_()
    exact = w.dtype == torch.float64
    search = torch.optim.LBFGS(
        [w],
        max_iter=steps,
        tolerance_grad=1e-9 if exact else 1e-5,
        tolerance_change=1e-12 if exact else 1e-8,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def objective() -> Tensor:
        # Standardising is folded into the weights: a copy of the features would double the memory.
        plain = w[:-1] / std[:, None]
        bias = w[-1] - mean @ plain
        loss, gradient, total = w.new_zeros(()), torch.zeros_like(w[:-1]), torch.zeros_like(w[-1])
        for x, y in rows:
            log_p = torch.addmm(bias, x, plain).log_softmax(1)  # (b, C)
            loss -= log_p.gather(1, y[:, None]).sum()
            error = log_p.exp_().scatter_add_(1, y[:, None], -torch.ones_like(y, dtype=w.dtype)[:, None])
            gradient.addmm_(x.T, error)
            total += error.sum(0)
        gradient = (gradient - mean[:, None] * total) / std[:, None] / len(rows) + strength * w[:-1]
        w.grad = torch.cat([gradient, total[None] / len(rows)])
        return loss / len(rows) + strength / 2 * w[:-1].square().sum()

    search.step(objective)
    return w.detach()


@torch.no_grad()
def hits(head: Head, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Whether the label is the first and whether it is among the first five classes of each row, ``(n,)`` bool."""
    places = np.concatenate([place(torch.addmm(head.bias, x, head.weight), y).cpu().numpy() for x, y in rows])
    return places < 1, places < 5


def place(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the label: ``(..., b, C), (b,) -> (..., b)``; of equal ones the lower comes first.

    A row that is not finite has its label last.
    """
    own = scores.gather(-1, labels[:, None].expand(*scores.shape[:-1], 1))
    lower = torch.arange(scores.shape[-1], device=scores.device) < labels[:, None]  # (b, C)
    before = ((scores > own) | ((scores == own) & lower)).sum(-1)
    return torch.where(scores.isfinite().all(-1), before, scores.shape[-1])
