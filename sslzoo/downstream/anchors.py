"""Boxes to begin with, at every place of every level."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

RATIOS = (0.5, 1.0, 2.0)


class Anchors(AnchorGenerator):
    """torchvision's, at the strides the levels really have, in float32 whatever the maps were computed in.

    Args:
        sizes: sides of the anchors at each level.
        ratios: height by width, at every level.
        strides: of the levels.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int]):
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        each = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [each] * len(image_list.image_sizes)
