"""Multi-crop: views of several resolutions through one network (SwAV, sec. 3.2)."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from sslzoo.errors import UserError


def by_resolution(forward: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """``forward`` on all views, one call for each run of views of the same size, as in the code of SwAV and DINO.

    BatchNorm in train mode therefore takes its statistics over all crops of one resolution. Two full views are one
    call, so any method of two views runs through here too.

    Args:
        forward: an encoder, ``(B, ...) -> (B, D)``.
        views: V tensors ``(B, 3, H_v, W_v)``, those of one size side by side.

    Returns:
        ``(V * B, D)``, crop-major: the rows of the first view, then those of the second, as ``chunk(V)`` undoes.
    """
    runs = (torch.cat(list(run)) for _, run in groupby(views, key=lambda x: x.shape[1:]))
    return torch.cat([forward(x) for x in runs])


def at_least_two(views: Sequence[Tensor], method: str) -> Sequence[Tensor]:
    """``views``, if there is a pair among them.

    Raises:
        UserError: if there is not.
    """
    if len(views) < 2:
        raise UserError(
            f"{method} compares views of an image but the configured views give {len(views)};"
            " choose views of at least 2, e.g. views=multicrop"
        )
    return views
