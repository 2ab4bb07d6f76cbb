"""The trailing copy that momentum methods learn from."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """Frozen exponential moving average of its students, run one after the other.

    Parameters only: the copy's BatchNorm keeps the statistics of its own forward passes, as in the official code
    of MoCo, BYOL and DINO.

    Args:
        students: modules to follow, e.g. an encoder and a projector; copied as they are now.
    """

    def __init__(self, *students: nn.Module):
        super().__init__()
        self.copies = nn.ModuleList(deepcopy(student) for student in students).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for copy in self.copies:
            x = copy(x)
        return x

    @torch.no_grad()
    def update(self, *students: nn.Module, momentum: float) -> None:
        """``copy <- momentum * copy + (1 - momentum) * student``, one operation over all parameters."""
        leading = [p for student in students for p in student.parameters()]
        torch._foreach_lerp_(list(self.copies.parameters()), leading, 1 - momentum)
