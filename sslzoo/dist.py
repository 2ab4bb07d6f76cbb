"""Named collectives; without a process group the world is one rank and each of them is the identity.

Rows are ordered by rank everywhere: rank r holds rows ``r * B`` to ``(r + 1) * B`` of what is gathered.
Every rank must hold the same number of rows, which the loader guarantees by dropping a short last batch; the first
time that a number of rows is gathered, ranks compare it.
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
    """Rows of all ranks, without a gradient: ``(B, ...) -> (W * B, ...)``.

    Raises:
        UserError: on every rank, if they hold unlike numbers of rows.
    """
    x = x.detach()
    if world() == 1:
        return x
    check_same(len(x), x.device)
    return _all_gather(x)


def _all_gather(x: Tensor) -> Tensor:
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


_compared: set[tuple[int, str, int]] = set()  # what all ranks are known to have alike


def check_same(number: int, device: torch.device, what: str = "batches of {} images") -> None:
    """Refuse numbers that differ between ranks, for collectives on unlike shapes wait for ever.

    Every rank must ask at the same point. The first time a number is met, ranks and their devices wait for each other;
    later it is only looked up, so a training step may ask. A number that changes on some of the ranks only is
    therefore not told: their collectives no longer match.

    Args:
        number: this rank's.
        device: where to compare.
        what: what the message calls it.

    Raises:
        UserError: on every rank.
    """
    key = (world(), what, number)
    if world() == 1 or key in _compared:
        return
    found = _all_gather(torch.tensor([number], device=device)).tolist()
    if len(set(found)) > 1:
        raise UserError(
            f"ranks got {what.format(', '.join(map(str, found)))}, but need as many each;"
            " start all of them with the same data and data.batch_size"
        )
    _compared.add(key)


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
