"""Normalisation beyond one device's batch: BatchNorm over all ranks, and GroupNorm with standardised weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from sslzoo.dist import all_sum_with_grad, world
from sslzoo.errors import UserError
from sslzoo.losses import full


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose training statistics are those of all ranks' rows: what torch's does on GPUs alone.

    Equal to BatchNorm over the concatenated batch, gradients included: biased variance to normalise, unbiased for
    ``running_var``. One rank is plain BatchNorm. Ranks may hold unlike numbers of rows, ``(B, C, ...)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and world() > 1:
            return self._over_ranks(x)
        return super().forward(x)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"BatchNorm needs (B, C, ...), got {tuple(x.shape)}")

    def _over_ranks(self, x: Tensor) -> Tensor:
        rest = [0, *range(2, x.ndim)]  # all dimensions but the channels'
        shape = [1, -1] + [1] * (x.ndim - 2)
        own = full(x).new_tensor([x.numel() // x.shape[1]])
        sums = all_sum_with_grad(torch.cat([full(x).sum(rest), own]))
        rows = sums[-1].detach()
        # The variance in a second pass: a mean of squares minus a squared mean loses digits.
        mean = sums[:-1] / rows
        centered = full(x) - mean.view(shape)
        variance = all_sum_with_grad(centered.square().sum(rest)) / rows  # (C,)
        if self.track_running_stats:
            self._remember(mean.detach(), variance.detach() * rows / (rows - 1))
        y = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class SyncBatchNormAct(SyncBatchNorm):
    """The same for timm's BatchNorm that has dropout and activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class GroupedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with statistics of its own for each of ``groups`` equal parts of the world's batch.

    As that many devices would compute it, running statistics included, though all other layers see the batch whole:
    a network run part by part would prepare its weights and sum their gradients once a part.
    """

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        parts, norm = max(1, self.groups // world()), super().forward
        if not self.training or parts == 1:
            return norm(x)
        return torch.cat([norm(part) for part in x.chunk(parts)])

    def _check_input_dim(self, x: Tensor) -> None:
        """Any ``(B, C, ...)``."""


class GroupedBatchNormAct(GroupedBatchNorm):
    """The same for timm's BatchNorm that has dropout and activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class StandardisedConv2d(nn.Conv2d):
    """Convolution by weights of mean 0 and variance 1 / fan-in per output channel (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardised(self.weight), self.bias)


class StandardisedLinear(nn.Linear):
    """Linear layer by weights of mean 0 and variance 1 / fan-in per output channel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, standardised(self.weight), self.bias)


def standardised(weight: Tensor, eps: float = 1e-4) -> Tensor:
    """Each output channel of ``weight`` at mean 0 and norm 1, so that variances pass through: ``(out, ...)``."""
    flat = weight.flatten(1)
    centered = flat - flat.mean(1, keepdim=True)
    return (centered * centered.square().sum(1, keepdim=True).clamp(min=eps).rsqrt()).view_as(weight)


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Meanwhile BatchNorms of ``module`` in train mode normalise by their batch, and do not remember what it was like.

    For images that evaluation does not resemble: ``running_mean``, ``running_var`` and ``num_batches_tracked`` stay.
    """
    layers = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    tracked = [layer for layer in layers if layer.track_running_stats]
    for layer in tracked:
        layer.track_running_stats = False  # the buffers stay, and eval mode still uses them
    try:
        yield
    finally:
        for layer in tracked:
            layer.track_running_stats = True


def has_batchnorm(module: nn.Module) -> bool:
    """Whether there is a BatchNorm of any kind in ``module``."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def sync_batchnorm(module: nn.Module, device: torch.device | None = None) -> nn.Module:
    """``module`` with every BatchNorm taking its statistics over all ranks; names and parameters stay the same.

    Args:
        module: changed in place, and returned; a new module if it is a BatchNorm itself.
        device: where it is going to run; null: where its parameters are. GPUs get torch's own SyncBatchNorm.

    Raises:
        UserError: on a kind of BatchNorm that is neither torch's nor timm's.
    """
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return _changed(module, lambda part: _synced(part, device.type == "cuda"))


def group_batchnorm(module: nn.Module, groups: int) -> nn.Module:
    """``module`` with every BatchNorm taking its statistics over one of ``groups`` parts of the world's batch.

    Raises:
        UserError: on a kind of BatchNorm that is neither torch's nor timm's.
    """
    return _changed(module, lambda part: _grouped(part, groups))


def group_norm_weight_standardisation(module: nn.Module, groups: int = 16) -> nn.Module:
    """``module`` without batch statistics: GroupNorm for every BatchNorm, standardised weights in conv and linear.

    As BYOL works even without batch statistics (Richemond et al. 2020, arXiv 2010.10241). Parameters stay the same;
    running statistics are gone.

    Raises:
        UserError: where a BatchNorm's channels do not split into ``groups``.
    """
    return _changed(module, lambda part: _without_batch(part, groups))


TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _changed(module: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _changed(child, change))
    return change(module)


def _synced(bn: nn.Module, gpu: bool) -> nn.Module:
    done = (SyncBatchNorm, nn.SyncBatchNorm) if gpu else SyncBatchNorm  # a part of two parents comes by twice
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm) or isinstance(bn, done):
        return bn
    _check_kind(bn, (*TORCHS, BatchNormAct2d))
    plain, act = (nn.SyncBatchNorm, timm.layers.SyncBatchNormAct) if gpu else (SyncBatchNorm, SyncBatchNormAct)
    return _same(bn, act if type(bn) is BatchNormAct2d else plain)


def _grouped(bn: nn.Module, groups: int) -> nn.Module:
    if isinstance(bn, nn.modules.batchnorm._BatchNorm) and not isinstance(bn, GroupedBatchNorm) and groups > 1:
        _check_kind(bn, (*TORCHS, BatchNormAct2d))
        bn = _same(bn, GroupedBatchNormAct if type(bn) is BatchNormAct2d else GroupedBatchNorm)
    if isinstance(bn, GroupedBatchNorm):
        bn.groups = groups
    return bn


def _same(bn: nn.Module, kind: type) -> nn.Module:
    """``bn`` as another ``kind`` of BatchNorm."""
    new = kind(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, device="meta")
    # The very same tensors: an optimizer or an EMA that knows them goes on as before.
    new.weight, new.bias = bn.weight, bn.bias
    new.running_mean, new.running_var = bn.running_mean, bn.running_var
    new.num_batches_tracked = bn.num_batches_tracked
    for name, child in bn.named_children():  # timm's dropout and activation
        setattr(new, name, child)
    return new.train(bn.training)


def _without_batch(part: nn.Module, groups: int) -> nn.Module:
    new: nn.Module
    if type(part) is nn.Conv2d:
        shape = (part.in_channels, part.out_channels, part.kernel_size, part.stride, part.padding, part.dilation)
        new = StandardisedConv2d(*shape, part.groups, part.bias is not None, part.padding_mode, device="meta")
    elif type(part) is nn.Linear:
        new = StandardisedLinear(part.in_features, part.out_features, part.bias is not None, device="meta")
    elif isinstance(part, nn.modules.batchnorm._BatchNorm):
        _check_kind(part, (*TORCHS, SyncBatchNorm))
        if part.num_features % groups:
            raise UserError(
                f"{part.num_features} channels do not split into {groups} groups; widen the encoder or head"
            )
        new = nn.GroupNorm(groups, part.num_features, part.eps, part.affine, device="meta")
    else:
        return part
    new.weight, new.bias = part.weight, part.bias
    return new.train(part.training)


def _check_kind(bn: nn.Module, kinds: tuple[type, ...]) -> None:
    if type(bn) not in kinds:
        raise UserError(
            f"{type(bn).__name__} is no BatchNorm that can be replaced; take an encoder with torch's BatchNorm"
        )
