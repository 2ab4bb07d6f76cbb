"""Projectors and predictors: roles of one block."""

from itertools import pairwise

from torch import nn


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
