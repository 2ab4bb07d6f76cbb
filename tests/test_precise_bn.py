"""BatchNorm's statistics over many batches: equal to those of all values at once, on any number of ranks."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import close, on_ranks
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.downstream.precise_bn import estimate_batchnorm
from sslzoo.method import Method


class Noisy(Method):
    """Two convolutions with a BatchNorm each, dropout between them, and a BatchNorm that nothing enters."""

    def __init__(self, dropout: float = 0.0):
        super().__init__(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)))
        self.second, self.bn = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=0.3)
        self.unused = nn.BatchNorm2d(2)
        self.to(torch.double)

    def loss(self, batch: Tensor) -> Tensor:
        return self.bn(self.second(self.encoder(batch))).square().mean()


def batches(*counts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        k + (1 + k) * torch.randn(n, 3, 7, 8, generator=generator, dtype=torch.double) for k, n in enumerate(counts)
    ]


def method(dropout: float = 0.0) -> Noisy:
    torch.manual_seed(0)
    made = Noisy(dropout)
    with torch.no_grad():
        made.encoder[1].weight.uniform_(0.5, 2)
        made.encoder[1].bias.normal_()
    return made


@torch.no_grad()
def test_they_are_the_mean_and_variance_of_all_values():
    net, parts = method(), batches(2, 5, 3)
    first = [net.encoder[0](x).numpy() for x in parts]
    second = []
    for x in first:  # normalised by its own batch, as in training
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        weight, bias = (p.numpy().reshape(1, -1, 1, 1) for p in (net.encoder[1].weight, net.encoder[1].bias))
        y = np.maximum((x - mean) / np.sqrt(var + 1e-5) * weight + bias, 0)
        second.append(net.second(torch.from_numpy(y)).numpy())
    estimate_batchnorm(net, parts)
    for layer, entered in ((net.encoder[1], first), (net.bn, second)):
        values = np.concatenate([x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1) for x in entered], 1)
        close(layer.running_mean.numpy(), values.mean(1))
        close(layer.running_var.numpy(), values.var(1))


def of_rank(rank: int) -> dict[str, Tensor]:
    """The statistics of one rank of two, or of the only one."""
    net, parts = sync_batchnorm(method()), batches(2, 6, 4)
    estimate_batchnorm(net, [x if rank < 0 else x.chunk(2)[rank] for x in parts])
    return {name: value for name, value in net.state_dict().items() if "running" in name}


def test_two_ranks_have_the_statistics_of_one_and_both_the_same():
    one, other = on_ranks(2, of_rank)
    for name, value in of_rank(-1).items():
        assert torch.equal(one[name], other[name])
        close(one[name], value)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_the_statistics_changes(training):
    net = method(dropout=0.5).train(training)
    net.second.eval()
    before, modes = copy.deepcopy(net.state_dict()), [part.training for part in net.modules()]
    state = torch.get_rng_state()
    estimate_batchnorm(net, batches(2, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in net.modules()] == modes
    assert [layer.momentum for layer in (net.encoder[1], net.bn)] == [0.1, 0.3]
    assert not any(part._forward_pre_hooks for part in net.modules())
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{layer}.running_{what}" for layer in ("encoder.1", "bn") for what in ("mean", "var")}
    assert all(p.grad is None for p in net.parameters())


def test_a_batch_that_fails_leaves_modes_as_they_were():
    net = method().eval()
    with pytest.raises(RuntimeError):
        estimate_batchnorm(net, [torch.zeros(2, 4, 7, 8, dtype=torch.double)])
    assert not any(part.training for part in net.modules())
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_they_do_not_depend_on_what_was_drawn_before():
    found = []
    for seed in (0, 1):
        net = method(dropout=0.5)
        torch.manual_seed(seed)
        estimate_batchnorm(net, batches(4, 4))
        found.append(net.bn.running_var)
    assert torch.equal(*found)
    net.seed = 1
    estimate_batchnorm(net, batches(4, 4))
    assert not torch.equal(net.bn.running_var, found[0])
