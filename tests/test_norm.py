"""BatchNorm over ranks equals BatchNorm over the whole batch; GroupNorm with standardised weights."""

import copy
from contextlib import suppress

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conftest import close, on_ranks
from sslzoo import dist
from sslzoo.blocks.norm import (
    SyncBatchNorm,
    group_batchnorm,
    group_norm_weight_standardisation,
    running_statistics_kept,
    standardised,
    sync_batchnorm,
)
from sslzoo.errors import UserError

KINDS = {
    "rows": (nn.BatchNorm1d(5), (8, 5)),
    "signals": (nn.BatchNorm1d(5, momentum=None), (8, 5, 3)),
    "images": (nn.BatchNorm2d(5, momentum=0.3, eps=1e-2), (8, 5, 3, 4)),
    "volumes": (nn.BatchNorm3d(5), (8, 5, 3, 2, 2)),
    "no affine": (nn.BatchNorm1d(5, affine=False), (8, 5)),
    "no running statistics": (nn.BatchNorm1d(5, track_running_stats=False), (8, 5)),
    "activation inside": (BatchNormAct2d(5), (8, 5, 3, 4)),
}


def two_passes(bn: nn.Module, x: torch.Tensor) -> dict:
    """Outputs and gradients of two training passes on this rank's rows, weighed unevenly."""
    weigh = dist.mine(torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape))
    x = dist.mine(x).requires_grad_()
    y = bn(2 * bn(x) + x.square())
    (y * weigh).sum().backward()
    grads = {name: dist.all_sum(p.grad) for name, p in bn.named_parameters()}
    return {"y": dist.all_gather(y), "x": dist.all_gather(x.grad), "grads": grads, "state": bn.state_dict()}


def all_on_rank(rank, inputs, half):
    """Everything that needs two ranks in one go, for a process takes seconds to start."""
    trained = {name: two_passes(sync_batchnorm(randomised(name)), x) for name, x in inputs.items()}
    kept = sync_batchnorm(randomised("rows")).eval()(inputs["rows"][rank : rank + 1])
    bn = sync_batchnorm(nn.BatchNorm1d(5))
    part = bn(dist.mine(half))
    wrapped = DistributedDataParallel(sync_batchnorm(small_net()))
    wrapped(dist.mine(inputs["rows"])).square().mean().backward()
    grads = {name: p.grad for name, p in wrapped.module.named_parameters()}
    return (
        trained,
        kept,
        grads,
        unevenly(inputs["images"][:3] if rank == 0 else inputs["images"][3:]),
        part,
        bn.running_var,
    )


def unevenly(x: torch.Tensor) -> dict:
    """Outputs, gradient and statistics of rows of which ranks may hold unlike numbers."""
    bn, x = sync_batchnorm(randomised("images")), x.clone().requires_grad_()
    y = bn(x)
    y.pow(3).sum().backward()
    return {"y": y.detach(), "x": x.grad, "state": bn.state_dict()}


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()


def randomised(name: str) -> nn.Module:
    torch.manual_seed(3)
    bn = copy.deepcopy(KINDS[name][0]).double()
    for p in bn.parameters():
        nn.init.normal_(p)
    return bn


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            same(value, b[key])
        else:
            torch.testing.assert_close(value, b[key], rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    # far from zero: a one-pass variance would lose digits
    return {name: torch.randn(shape, dtype=torch.double) * 3 + 100 for name, (_, shape) in KINDS.items()}


@pytest.fixture(scope="module")
def half():
    return (torch.randn(64, 5) + 20).bfloat16()


@pytest.fixture(scope="module")
def ranks(inputs, half):
    return on_ranks(2, all_on_rank, inputs, half)


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_equal_batchnorm_over_the_whole_batch(name, inputs, ranks):
    whole = two_passes(randomised(name), inputs[name])
    for trained, *_ in ranks:
        same(whole, trained[name])


def test_ranks_with_unlike_numbers_of_rows_equal_batchnorm_over_all_of_them(inputs, ranks):
    whole = unevenly(inputs["images"])
    parts = [uneven for _, _, _, uneven, *_ in ranks]
    for name in ("y", "x"):
        close(torch.cat([part[name] for part in parts]), whole[name])
    for part in parts:
        same(part["state"], whole["state"])


def test_eval_uses_running_statistics_and_asks_no_other_rank(inputs, ranks):
    close(torch.cat([kept for _, kept, *_ in ranks]), randomised("rows").eval()(inputs["rows"][:2]))


def test_it_trains_under_ddp_which_refuses_torchs_own_on_cpus(inputs, ranks):
    net = small_net()
    net(inputs["rows"]).square().mean().backward()
    for _, _, grads, *_ in ranks:
        for name, p in net.named_parameters():
            close(grads[name], p.grad)


def test_gpus_get_torchs_own():
    net = sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4), BatchNormAct2d(4)), torch.device("cuda"))
    assert type(net[0]) is nn.SyncBatchNorm
    assert isinstance(net[1], nn.SyncBatchNorm)
    torch.testing.assert_close(net.eval()(torch.ones(2, 4, 1, 1)).min(), torch.tensor(1 / (1 + 1e-5)))


def test_bfloat16_keeps_its_statistics_in_float32(half, ranks):
    whole = nn.BatchNorm1d(5)
    y = whole(half.float())
    for rank, (*_, part, variance) in enumerate(ranks):
        assert part.dtype == torch.bfloat16
        torch.testing.assert_close(part.float(), y.chunk(2)[rank], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(variance, whole.running_var, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("change", [lambda bn: bn, sync_batchnorm, lambda bn: group_batchnorm(bn, 4)])
def test_images_that_are_not_remembered_are_normalised_by_their_batch_all_the_same(inputs, name, change):
    bn = nn.Sequential(change(randomised(name)))
    bn(inputs[name])
    before, normal = copy.deepcopy(bn.state_dict()), bn(2 * inputs[name])
    bn.load_state_dict(before)
    with suppress(KeyError), running_statistics_kept(bn):
        close(bn(2 * inputs[name]), normal)
        raise KeyError  # whatever happens meanwhile
    same(dict(bn.state_dict()), before)
    evaluated = bn.eval()(inputs[name])
    with running_statistics_kept(bn):
        close(bn(inputs[name]), evaluated)
    bn.train()(inputs[name] - 50)
    remembers = KINDS[name][0].track_running_stats
    assert any((value != before[key]).any() for key, value in bn.state_dict().items()) == remembers


def test_one_rank_is_plain_batchnorm():
    x = torch.randn(8, 5, dtype=torch.double)
    same(two_passes(randomised("rows"), x), two_passes(sync_batchnorm(randomised("rows")), x))


def test_conversion_keeps_names_tensors_and_frozen_parts():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(BatchNormAct2d(6)))
    net[1].bias.requires_grad_(False)
    net[1].eval()
    names, weight = list(net.state_dict()), net[1].weight
    converted = sync_batchnorm(net)
    assert list(converted.state_dict()) == names
    assert converted[1].weight is weight
    assert not converted[1].bias.requires_grad
    assert not converted[1].training
    assert isinstance(converted[2][0], SyncBatchNorm)
    assert sync_batchnorm(converted)[1] is converted[1]


def test_unknown_batchnorm_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="Own is no BatchNorm"):
        sync_batchnorm(nn.Sequential(Own(4)))


def test_standardised_weights_have_mean_zero_and_norm_one_per_output_channel():
    weight = standardised(torch.randn(6, 3, 5, 5, dtype=torch.double) * 7 + 2)
    close(weight.mean((1, 2, 3)), torch.zeros(6, dtype=torch.double))
    close(weight.square().sum((1, 2, 3)), torch.ones(6, dtype=torch.double))


def test_group_norm_removes_all_batch_statistics_and_keeps_parameters():
    net = timm.create_model("resnet18", num_classes=3)
    names = [name for name, _ in net.named_parameters()]
    net = group_norm_weight_standardisation(net)
    assert [name for name, _ in net.named_parameters()] == names
    assert not list(net.buffers())
    x = torch.randn(3, 3, 32, 32)
    net.train()
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-5)  # one image does not see the others


def test_group_norm_equals_its_parts():
    net = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)).double()
    x, weight = torch.randn(2, 3, 8, 8, dtype=torch.double), net[0].weight.detach()
    net = group_norm_weight_standardisation(net)
    expected = nn.functional.conv2d(x, standardised(weight), stride=2, padding=1).view(2, 16, -1)
    expected = (expected - expected.mean(2, keepdim=True)) / (expected.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    close(net(x).detach(), expected.view(2, 32, 4, 4))


def test_channels_that_do_not_split_into_groups_are_refused():
    with pytest.raises(UserError, match="10 channels do not split into 16 groups"):
        group_norm_weight_standardisation(nn.Sequential(nn.BatchNorm1d(10)))


@pytest.mark.parametrize("bn", [nn.BatchNorm1d(5), nn.BatchNorm2d(5, momentum=0.3), BatchNormAct2d(5)], ids=str)
def test_batchnorm_in_groups_equals_plain_batchnorm_on_each_part_in_turn(bn):
    shape = (8, 5) if isinstance(bn, nn.BatchNorm1d) else (8, 5, 3, 4)
    plain, x = copy.deepcopy(bn).double(), torch.randn(shape, dtype=torch.double)
    parted = group_batchnorm(copy.deepcopy(bn).double(), 4)
    weigh = torch.linspace(-1, 2, x.numel(), dtype=torch.double).view(shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = parted(ours)
    expected = torch.cat([plain(part) for part in theirs.chunk(4)])
    (y * weigh).sum().backward()
    (expected * weigh).sum().backward()
    close(y, expected)
    close(ours.grad, theirs.grad)
    close(parted.weight.grad, plain.weight.grad)
    for name, value in plain.state_dict().items():
        close(parted.state_dict()[name], value)
    close(parted.eval()(x), plain.eval()(x))
    assert not torch.allclose(y, group_batchnorm(parted.train(), 1)(x))


def test_one_group_leaves_batchnorm_as_it_is():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    assert type(group_batchnorm(net, 1)[1]) is nn.BatchNorm1d
    assert [*group_batchnorm(net, 2).state_dict()] == [*nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).state_dict()]
