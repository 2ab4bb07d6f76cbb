"""Precise BatchNorm: statistics of many images under the final weights, in place of a running average.

While weights move, a running average mixes statistics of old weights; what is tested then is another network than the
one that was trained (Wu and Johnson 2021, arXiv 2105.07576, sec. 3). Detectron2's protocols for self-supervised
backbones ask for it (``TEST.PRECISE_BN``).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslzoo.dist import all_sum, rank
from sslzoo.errors import UserError
from sslzoo.losses import full
from sslzoo.method import Method


def check_images(number: int) -> None:
    """Refuse, by UserError, a ``task.precise_bn`` below 0: how many images statistics are estimated on, 0 for none."""
    if number < 0:
        raise UserError(f"task.precise_bn={number} is no number of images; set it to 0 or more")


@torch.no_grad()
def estimate_batchnorm(method: Method, batches: Iterable) -> None:
    """Give every BatchNorm the mean and variance of all that enters it over ``batches``, weights fixed.

    Meanwhile layers normalise by their batch, as in training. The mean is the mean of the batches' means, the variance
    follows from the law of total variance, ``E[var] + E[mean^2] - E[mean]^2``, each batch weighed by its number of
    values (as fvcore's ``update_bn_stats`` does), all ranks together. A layer that nothing enters stays as it is.
    Modes, momentum and the count of batches are afterwards what they were; what is drawn at random depends on
    ``method.seed`` alone.

    Args:
        method: its ``loss`` is computed, and thrown away.
        batches: what ``loss`` takes; every rank gives as many.
    """
    layers = [part for part in method.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    if not layers:
        return
    # Sums over all values of 1, x and x^2, by layer: (3, C)
    sums = {layer: layer.running_mean.new_zeros(3, layer.num_features, dtype=torch.double) for layer in layers}
    counts = [layer.num_batches_tracked.clone() for layer in layers]
    modes = {part: part.training for part in method.modules()}

    def add(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        sums[layer] += _sums(inputs[0])

    handles = [layer.register_forward_pre_hook(add) for layer in layers]
    device = next(method.parameters()).device
    method.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for step, batch in enumerate(batches):
                torch.manual_seed(hash((method.seed, step, rank())) % 2**63)
                method.loss(method.transfer_batch_to_device(batch, device, 0))
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes.items():
            part.training = mode
    for layer, count in zip(layers, counts, strict=True):
        number, first, second = all_sum(sums[layer])
        layer.num_batches_tracked.copy_(count)
        if number[0]:
            mean = first / number
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(second / number - mean.square())


def _sums(x: Tensor) -> Tensor:
    """Sums of 1, x and x^2 over all but the channels, in float64: ``(B, C, ...) -> (3, C)``."""
    number = x.numel() // x.shape[1]
    if not number:
        return x.new_zeros(3, x.shape[1], dtype=torch.double)
    # From the variance, which unlike a sum of squares keeps its digits in float32
    variance, mean = torch.var_mean(full(x), dim=[0, *range(2, x.ndim)], correction=0)
    variance, mean = variance.double(), mean.double()
    return number * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])
