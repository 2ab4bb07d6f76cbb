"""Projectors and predictors, roles of one block, and DINO's head."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslzoo.losses import full, unit


def _norm(kind: str | None, width: int, affine: bool = True, beta: bool = True) -> list[nn.Module]:
    if kind is None:
        return []
    if kind == "layer":
        return [nn.LayerNorm(width)]
    norm = nn.BatchNorm1d(width, affine=affine)
    if affine and not beta:
        norm.bias.requires_grad_(False)  # stays at zero: a scale without a shift
    return [norm]


class MLP(nn.Sequential):
    """Linear layers with a norm and ReLU between them: ``MLP(2048, 512, 2048)``; ``(B, dims[0]) -> (B, dims[-1])``.

    Args:
        dims: widths, input first.
        norm: "batch", "layer" or None, after each hidden layer.
        last_norm: norm after the last layer: "batch", "batch_no_affine", "batch_no_beta", "layer" or None.
        bias: whether hidden layers have one; None: only where no norm follows.
        last_bias: whether the last layer has one; None: only where no norm follows.
    """

    def __init__(
        self,
        *dims: int,
        norm: str | None = None,
        last_norm: str | None = None,
        bias: bool | None = None,
        last_bias: bool | None = None,
    ):
        layers: list[nn.Module] = []
        for before, after in pairwise(dims[:-1]):
            layers += [nn.Linear(before, after, bias=norm is None if bias is None else bias)]
            layers += [*_norm(norm, after), nn.ReLU(inplace=True)]
        layers += [nn.Linear(dims[-2], dims[-1], bias=last_norm is None if last_bias is None else last_bias)]
        kind = last_norm and last_norm.split("_")[0]
        layers += _norm(kind, dims[-1], affine=last_norm != "batch_no_affine", beta=last_norm != "batch_no_beta")
        super().__init__(*layers)


class DINOHead(nn.Module):
    """Three layers, a bottleneck of unit length, and its scores against K weight-normed rows: ``(B, D) -> (B, K)``.

    Scores are in at least float32; initial weights are those of DINO's code.

    Args:
        dim: D.
        hidden, bottleneck: widths of the hidden layers and of the bottleneck.
        out_dim: K.
        use_bn: BatchNorm after each hidden layer.
        norm_last_layer: rows stay at length one; false lets them learn it.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, out_dim: int, use_bn: bool, norm_last_layer: bool):
        super().__init__()
        layers: list[nn.Module] = []
        for before in (dim, hidden):
            layers += [nn.Linear(before, hidden), *([nn.BatchNorm1d(hidden)] if use_bn else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in (part for part in self.mlp if isinstance(part, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        v = nn.Linear(bottleneck, out_dim, bias=False).weight  # w = g * v / |v|, kept apart: the average follows both
        self.last_layer = nn.ParameterDict({"weight_g": g, "weight_v": v})

    def forward(self, x: Tensor) -> Tensor:
        z, last = unit(self.mlp(x)), self.last_layer
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(z, full(last["weight_g"]) * unit(last["weight_v"]))
