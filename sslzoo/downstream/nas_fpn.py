"""NAS-FPN (Ghiasi et al. 2019, arXiv 1904.07392): a pyramid whose connections were found by search, stacked.

The cell is the one that was published for levels 3 to 7, as in the authors' code (tensorflow/tpu).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslzoo.downstream.necks import Norm

LEVELS = (3, 4, 5, 6, 7)  # of the maps that go in, and come out: strides 8 to 128


class Node(NamedTuple):
    """A map made of two others: places 0 to 4 are a cell's inputs, from 5 on its nodes.

    Attributes:
        level: of the new map.
        combine: ``sum``, or ``attention``, where the coarser of the two says which channels of the finer it takes.
        inputs: places of the two.
        output: whether it is one of the cell's five, which also take in the maps of their level that nobody has used.
    """

    level: int
    combine: str
    inputs: tuple[int, int]
    output: bool


NODES = (
    Node(4, "attention", (1, 3), False),
    Node(4, "sum", (1, 5), False),
    Node(3, "sum", (0, 6), True),
    Node(4, "sum", (6, 7), True),
    Node(5, "attention", (7, 8), True),
    Node(7, "attention", (6, 9), True),
    Node(6, "attention", (9, 10), True),
)


class NASFPN(nn.Module):
    """``[(B, widths[i], H / 2**l, W / 2**l) for l in (3, 4, ...)] -> [(B, channels, ...) for l in LEVELS]``.

    Maps get ``channels`` by a 1x1 convolution where they have another number; levels that are missing at the end are
    the last one, pooled.

    Args:
        widths: channels of the maps, at most five.
        channels: of every level.
        repeats: cells; 7 in Zoph et al. 2020 (arXiv 2006.06882).
        norm: after every convolution.
    """

    def __init__(self, widths: list[int], channels: int, repeats: int, norm: Norm):
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Identity() if width == channels else nn.Sequential(*_normed(nn.Conv2d(width, channels, 1), norm))
            for width in widths
        )
        self.cells = nn.ModuleList(Cell(channels, norm) for _ in range(repeats))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels = [lateral(each) for lateral, each in zip(self.laterals, maps, strict=True)]
        while len(levels) < len(LEVELS):
            levels.append(F.max_pool2d(levels[-1], 2, ceil_mode=True))
        for cell in self.cells:
            levels = cell(levels)
        return levels


class Cell(nn.Module):
    """Five maps in, five maps of the same shapes out."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.convs = nn.ModuleList(nn.Sequential(nn.ReLU(), *separable(channels, norm)) for _ in NODES)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        maps, at, unused = list(levels), list(LEVELS), set(range(len(levels)))
        sizes = {level: each.shape[-2:] for level, each in zip(LEVELS, levels, strict=True)}
        for (level, combine, inputs, output), conv in zip(NODES, self.convs, strict=True):
            unused -= set(inputs)
            finer, coarser = sorted(inputs, key=lambda place: at[place])
            a, b = (resampled(maps[place], at[place], level, sizes[level]) for place in (finer, coarser))
            new = a + b if combine == "sum" else b + a * b.amax((2, 3), keepdim=True).sigmoid()
            for place in sorted(unused) if output else ():
                if at[place] == level:
                    new = new + maps[place]
                    unused.discard(place)
            unused.add(len(maps))
            maps.append(conv(new))
            at.append(level)
        outputs = {node.level: each for node, each in zip(NODES, maps[len(levels) :], strict=True) if node.output}
        return [outputs[level] for level in LEVELS]


def resampled(x: Tensor, level: int, wanted: int, size: torch.Size) -> Tensor:
    """A map of one level at another's ``size``: max-pooled, or its pixels repeated."""
    if wanted > level:
        return F.max_pool2d(x, 2 ** (wanted - level), ceil_mode=True)
    if wanted < level:
        return F.interpolate(x, scale_factor=2 ** (level - wanted))[..., : size[0], : size[1]]
    return x


def separable(channels: int, norm: Norm) -> list[nn.Module]:
    """A 3x3 convolution of each channel by itself, one over all channels at each place, and a norm."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return [depthwise, *_normed(nn.Conv2d(channels, channels, 1), norm)]


def _normed(conv: nn.Conv2d, norm: Norm) -> list[nn.Module]:
    return [conv] if norm is None else [conv, norm(conv.out_channels)]
