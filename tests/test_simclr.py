"""SimCLR v1 and v2: two ranks, joint BatchNorm, more views, the memory, heads."""

import math
from itertools import combinations

import pytest
import torch
from lightly.loss import NTXentLoss

from conftest import Tiny, close
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.errors import UserError
from sslzoo.losses import nt_xent, unit
from sslzoo.methods.simclr import SimCLR
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, batch_size=8, momentum=0.9, weight_decay=1e-3)
TWO, THREE = [(12,)] * 2, [(12,)] * 3


def make(queue_size: int = 0) -> SimCLR:
    return SimCLR(Tiny(), SGD, dim=8, layers=2, temperature=0.2, queue_size=queue_size, momentum=0.9).double()


def make_synced() -> SimCLR:
    return sync_batchnorm(make(queue_size=24))


def slow_nt_xent(z1, z2, temperature, negatives=()):
    z, n = [*z1, *z2], len(z1)
    terms = []
    for i in range(2 * n):
        others = [z[i] @ z[k] / temperature for k in range(2 * n) if k != i] + [
            z[i] @ k / temperature for k in negatives
        ]
        terms.append(torch.stack(others).exp().sum().log() - z[i] @ z[(i + n) % (2 * n)] / temperature)
    return sum(terms) / (2 * n)


def projected(method, views):
    return unit(method.projector(method.encoder(torch.cat(views)))).chunk(len(views))


def test_two_ranks_equal_one_with_three_views_and_a_memory():
    batches = random_batches(5, 8, THREE)
    alone = train_alone(make_synced, batches)
    first, second = train_on_ranks(2, make_synced, batches)
    assert_same(alone, first)
    assert_same(alone, second)
    assert torch.equal(first["state"]["queue.keys"], second["state"]["queue.keys"])


def test_loss_of_two_views_is_the_papers():
    method, (batch,) = make(), random_batches(1, 8, TWO)
    close(method.loss(batch), slow_nt_xent(*projected(method, batch.views), 0.2))


def test_loss_of_more_full_views_is_the_mean_over_all_pairs():
    method, (batch,) = make(), random_batches(1, 8, [(12,)] * 4)
    z = projected(method, batch.views)
    pairs = list(combinations(range(4), 2))
    close(method.loss(batch), sum(slow_nt_xent(z[i], z[j], 0.2) for i, j in pairs) / len(pairs))


def test_both_views_share_one_batchnorm_pass():
    method, (batch,) = make(), random_batches(1, 8, TWO)
    method.loss(batch)
    assert method.encoder[1].num_batches_tracked == method.projector[1].num_batches_tracked == 1


def test_memory_holds_negatives_of_earlier_steps_only():
    method, (batch,) = make(queue_size=24), random_batches(1, 8, TWO)
    before = method.queue.keys.clone()
    close(method.loss(batch), slow_nt_xent(*projected(method, batch.views), 0.2, before))
    assert torch.equal(method.queue.keys, before)
    method.after_step()
    assert (method.queue.keys[:8] != before[:8]).all()
    assert torch.equal(method.queue.keys[8:], before[8:])
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())


@pytest.mark.parametrize("queue_size", [0, 24])
def test_loss_at_chance_is_the_loss_of_equal_features(queue_size):
    method, (batch,) = make(queue_size), random_batches(1, 8, TWO)
    with torch.no_grad():
        method.projector[-1].weight.zero_()
    assert (
        method.loss(batch).item() == pytest.approx(method.loss_at_chance()) == pytest.approx(math.log(15 + queue_size))
    )


def test_loss_is_lightlys_but_for_its_normalisation_inside():
    z1, z2 = unit(torch.randn(8, 6)), unit(torch.randn(8, 6))
    torch.testing.assert_close(nt_xent(z1, z2, 0.3), NTXentLoss(temperature=0.3)(z1, z2))


def test_bfloat16_loses_nothing_in_the_logits():
    method, (batch,) = make().float(), random_batches(1, 8, TWO)
    batch = batch._replace(views=[x.float() for x in batch.views])
    with torch.autocast("cpu", torch.bfloat16):
        z1, z2 = projected(method, batch.views)
        loss = nt_xent(z1, z2, 0.01)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(z1.double(), z2.double(), 0.01).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layers", "parameters"), [(2, 4_460_672), (3, 8_659_072)])
def test_heads_have_the_papers_number_of_parameters(layers, parameters):
    encoder = torch.nn.Identity()
    encoder.dim = 2048
    method = SimCLR(encoder, layers=layers)
    assert sum(p.numel() for p in method.projector.parameters() if p.requires_grad) == parameters
    assert method.up_to_layer(1)(torch.randn(2, 2048)).min() >= 0  # after the ReLU


def test_one_view_is_refused():
    with pytest.raises(UserError, match="SimCLR compares views"):
        make().loss(random_batches(1, 8, [(12,)])[0])


def test_no_layers_are_refused():
    with pytest.raises(UserError, match="layers=0"):
        SimCLR(Tiny(), layers=0)
