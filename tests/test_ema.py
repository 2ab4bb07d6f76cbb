"""The trailing copy: its formula, whom it follows, what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

from conftest import Tiny, close
from sslzoo.blocks.ema import EMA


def moved(module: nn.Module) -> nn.Module:
    """Other weights and other statistics, as a training step leaves them."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    module(torch.randn(16, 12, dtype=next(module.parameters()).dtype))
    return module


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_update_is_the_formula_for_every_parameter_of_every_student(momentum):
    encoder, head = Tiny().double(), nn.Linear(14, 3).double()
    target = EMA(encoder, head)
    for _ in range(2):
        moved(encoder)
        head.weight.data.mul_(1.5)
        before = [p.clone() for p in target.parameters()]
        target.update(encoder, head, momentum=momentum)
        students = [*encoder.parameters(), *head.parameters()]
        for copied, old, own in zip(target.parameters(), before, students, strict=True):
            close(copied, momentum * old + (1 - momentum) * own)


def test_momentum_zero_copies_and_one_keeps_to_the_bit():
    encoder = Tiny()
    target = EMA(encoder)
    old = [p.clone() for p in target.parameters()]
    moved(encoder)
    target.update(encoder, momentum=1.0)
    assert all(torch.equal(p, q) for p, q in zip(target.parameters(), old, strict=True))
    target.update(encoder, momentum=0.0)
    assert all(torch.equal(p, q) for p, q in zip(target.parameters(), encoder.parameters(), strict=True))


def test_copies_are_run_one_after_the_other():
    encoder, head = Tiny(), nn.Linear(14, 3)
    x = torch.randn(8, 12)
    torch.testing.assert_close(EMA(encoder, head)(x), head(copy.deepcopy(encoder)(x)))


def test_copies_are_frozen_and_the_students_are_not():
    encoder = Tiny()
    target = EMA(encoder)
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in encoder.parameters())
    target(torch.randn(4, 12)).sum()
    target.update(encoder, momentum=0.5)
    assert not any(p.requires_grad or p.grad is not None for p in target.parameters())


def test_statistics_of_batchnorm_are_not_averaged_but_the_copys_own():
    encoder = Tiny()
    target = EMA(encoder)
    own = {name: buffer.clone() for name, buffer in target.named_buffers()}
    moved(encoder)
    target.update(encoder, momentum=0.5)
    assert all(torch.equal(buffer, own[name]) for name, buffer in target.named_buffers())
    target(torch.randn(16, 12))
    assert not torch.equal(target.copies[0][1].running_mean, own["copies.0.1.running_mean"])


def follows(target: EMA, encoder: nn.Module) -> bool:
    before = [p.clone() for p in target.parameters()]
    moved(encoder)
    target.update(encoder, momentum=0.5)
    for p, q, r in zip(target.parameters(), before, encoder.parameters(), strict=True):
        torch.testing.assert_close(p, (q + r) / 2)
    return True


def test_goes_on_following_after_load_state_dict():
    encoder, other = Tiny(), Tiny()
    target = EMA(encoder)
    assert follows(target, encoder)
    target.load_state_dict(EMA(other).state_dict())
    encoder.load_state_dict(moved(other).state_dict())
    assert follows(target, encoder)


def test_goes_on_following_after_a_change_of_precision():
    encoder = Tiny()
    target = EMA(encoder)
    assert follows(target, encoder)
    encoder.double(), target.double()
    assert follows(target, encoder)
    assert next(target.parameters()).dtype == torch.double


def test_follows_whom_it_is_given_last():
    first, second = Tiny(), Tiny()
    target = EMA(first)
    assert follows(target, first)
    assert follows(target, second)


def test_a_copied_method_trails_its_own_student():
    pair = nn.ModuleDict({"encoder": Tiny()})
    pair["target"] = EMA(pair["encoder"])
    assert follows(pair["target"], pair["encoder"])
    twin = copy.deepcopy(pair)
    kept = [p.clone() for p in pair["target"].parameters()]
    assert follows(twin["target"], twin["encoder"])
    assert all(torch.equal(p, q) for p, q in zip(pair["target"].parameters(), kept, strict=True))


def test_a_replaced_parameter_is_followed():
    encoder = Tiny()
    target = EMA(encoder)
    assert follows(target, encoder)
    encoder[0].weight = nn.Parameter(torch.randn_like(encoder[0].weight))
    assert follows(target, encoder)


def test_no_value_is_read_by_the_host():
    encoder = Tiny().to("meta")
    target = EMA(encoder)
    target.update(encoder, momentum=0.9)
    assert next(target.parameters()).is_meta
