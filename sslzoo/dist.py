"""Named collectives; without a process group the world is one rank and each of them is the identity.

Rows are ordered by rank everywhere: rank r holds rows ``r * B`` to ``(r + 1) * B`` of what is gathered.
Every rank must hold the same number of rows, which the loader guarantees by dropping a short last batch.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from sslzoo.errors import UserError


def world() -> int:
    """Number of ranks, 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place in the world, 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def mine(x: Tensor) -> Tensor:
    """The rows of a gathered tensor that belong to this rank: ``(W * B, ...) -> (B, ...)``."""
    return x.chunk(world())[rank()]


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Rows of all ranks, without a gradient: ``(B, ...) -> (W * B, ...)``."""
    x = x.detach()
    if world() == 1:
        return x
    everyone = x.new_empty((world() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(everyone, x.contiguous())
    return everyone


@torch.no_grad()
def all_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks, without a gradient; the input is left as it is."""
    x = x.detach().clone()
    if world() > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def all_mean(x: Tensor) -> Tensor:
    """Mean of ``x`` over ranks, without a gradient."""
    return all_sum(x) / world()


@torch.no_grad()
def from_rank_zero(x: Tensor) -> None:
    """Overwrite ``x`` in place with rank 0's."""
    if world() > 1:
        dist.broadcast(x, src=0)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return mine(all_sum(grad))


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_sum(grad)


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks, ``(B, ...) -> (W * B, ...)``, through which gradients reach the rank they came from.

    The backward pass sums over ranks, so after DDP's averaging the parameters receive the gradient of the
    mean of the ranks' losses.
    """
    return _AllGather.apply(x) if world() > 1 else x


def all_sum_with_grad(x: Tensor) -> Tensor:
    """Sum of ``x`` over ranks; the backward pass sums the ranks' gradients likewise."""
    return _AllSum.apply(x) if world() > 1 else x


def check_same_rows(rows: int, device: torch.device) -> None:
    """Refuse a batch of which ranks hold unlike numbers of rows, for collectives would wait for ever. Waits for all.

    Raises:
        UserError: on every rank.
    """
    if world() > 1:
        found = all_gather(torch.tensor([rows], device=device)).tolist()
        if len(set(found)) > 1:
            raise UserError(
                f"ranks got batches of {', '.join(map(str, found))} images, but need as many each;"
                " start all of them with the same data and data.batch_size"
            )


@torch.no_grad()
def shuffled(forward: Callable[[Tensor], Tensor], x: Tensor, order: Tensor) -> Tensor:
    """Keys by Shuffling BN (MoCo, sec. 3.3): encode a random share of the world's images, undo the order.

    A key is then normalised with other images than its query, so BatchNorm statistics do not give the pair
    away. On one device the order alone changes nothing: there BatchNorm must work in groups (``blocks.norm``).

    Args:
        forward: the key encoder, ``(b, ...) -> (b, d)``.
        x: this rank's views, ``(B, 3, H, W)``.
        order: one permutation of ``W * B``, equal on all ranks.

    Returns:
        This rank's keys ``(B, d)`` in the order of ``x``, without a gradient.
    """
    order = order.to(x.device)
    keys = all_gather(forward(mine(all_gather(x)[order])))
    return mine(keys[order.argsort()])
