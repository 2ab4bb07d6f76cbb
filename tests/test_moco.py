"""MoCo v1 and v2: two ranks, accumulation, configuration."""

import math

import pytest
import torch

from conftest import Tiny
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.errors import UserError
from sslzoo.methods import MoCo
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, momentum=0.9, weight_decay=1e-3)


def make_bn() -> MoCo:
    """Per-GPU statistics, as in the paper: two groups, whatever the ranks."""
    return MoCo(Tiny(), SGD, dim=8, layers=2, queue_size=24, bn_groups=2, symmetric=True, momentum=0.9).double()


def make_without_bn() -> MoCo:
    return MoCo(Tiny(norm=False), SGD, dim=8, queue_size=24, bn_groups=1, momentum=0.9).double()


def test_two_ranks_equal_one_with_the_batch_split_into_two_bn_groups():
    batches = random_batches(5, 8, [(12,), (12,)])
    alone = train_alone(make_bn, batches)
    for rank in train_on_ranks(2, make_bn, batches):
        # Running statistics stay per device, as in the paper; they take no part in training.
        assert_same(alone, rank, skip=["running_", "num_batches"])


def test_two_ranks_have_the_same_queue_to_the_bit():
    first, second = train_on_ranks(2, make_bn, random_batches(3, 8, [(12,), (12,)]))
    assert torch.equal(first["state"]["queue.keys"], second["state"]["queue.keys"])


def test_accumulating_two_halves_equals_one_batch():
    batches = random_batches(5, 8, [(12,), (12,)])
    assert_same(train_alone(make_without_bn, batches), train_alone(make_without_bn, batches, accumulate=2))


def test_keys_of_a_step_are_not_its_negatives():
    method, (batch,) = make_without_bn(), random_batches(1, 8, [(12,), (12,)])
    before = method.queue.keys.clone()
    method.loss(batch)
    assert torch.equal(method.queue.keys, before)
    method.after_step()
    assert (method.queue.keys[:8] != before[:8]).all()
    assert torch.equal(method.queue.keys[8:], before[8:])


def test_target_receives_no_gradient_and_its_batchnorm_is_its_own():
    method, (batch,) = make_bn(), random_batches(1, 8, [(12,), (12,)])
    method.loss(batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    method.after_step()
    own, copy = method.encoder[1].running_mean, method.target.copies[0][1].running_mean
    assert not torch.equal(own, copy)


def test_symmetric_loss_is_the_mean_of_both_ways():
    method, (batch,) = make_without_bn(), random_batches(1, 8, [(12,), (12,)])
    there, back = (method.loss(batch._replace(views=views)) for views in (batch.views, batch.views[::-1]))
    method.symmetric = True
    torch.testing.assert_close(method.loss(batch), (there + back) / 2)


def test_loss_at_chance_is_the_loss_of_equal_features():
    method, (batch,) = make_without_bn(), random_batches(1, 8, [(12,), (12,)])
    method.queue.keys = torch.zeros_like(method.queue.keys)
    with torch.no_grad():
        method.projector[0].weight.zero_()
        method.projector[0].bias.zero_()
        method.target.copies[1][0].weight.zero_()
        method.target.copies[1][0].bias.zero_()
    assert method.loss(batch).item() == pytest.approx(method.loss_at_chance()) == pytest.approx(math.log(25))


@pytest.mark.parametrize(("size", "groups"), [(8, 3), (8, 8)])
def test_a_batch_that_does_not_split_into_bn_groups_is_refused(size, groups):
    method = MoCo(Tiny(), SGD, dim=8, queue_size=24, bn_groups=groups).double()
    with pytest.raises(UserError, match=f"bn_groups={groups} does not split a batch of {size}"):
        method.loss(random_batches(1, size, [(12,), (12,)])[0])


def test_head_of_v2_has_the_papers_number_of_parameters():
    encoder = torch.nn.Identity()
    encoder.dim = 2048
    method = MoCo(encoder, layers=2, queue_size=8)
    assert sum(p.numel() for p in method.projector.parameters()) == 4_458_624
