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


def full_views(views: Sequence[Tensor]) -> int:
    """How many views are full, and so targets or keys: the first two, and those after them of the first one's size."""
    unlike = (v for v, x in enumerate(views) if v > 1 and x.shape[1:] != views[0].shape[1:])
    return next(unlike, len(views))


def at_least_two(views: Sequence[Tensor], method: str) -> Sequence[Tensor]:
    """``views``, if there is a pair among them.

    Raises:
        UserError: if there is not.
    """
    check_count(len(views), method, compares_views=True)
    return views


def the_only_one(views: Sequence[Tensor], method: str) -> Tensor:
    """The view of a method that compares none.

    Raises:
        UserError: if there are more.
    """
    check_count(len(views), method, compares_views=False)
    return views[0]


def check_count(count: int, method: str, compares_views: bool) -> None:
    """Refuse ``count`` views an image: a method that compares views needs two or more, another one exactly one."""
    if compares_views and count < 2:
        raise UserError(
            f"{method} compares views of an image but the configured views give {count};"
            " choose views of at least 2, e.g. views=multicrop"
        )
    if not compares_views and count != 1:
        raise UserError(
            f"{method} learns from one view of an image but the configured views give {count};"
            " choose views of 1, e.g. views=single"
        )
