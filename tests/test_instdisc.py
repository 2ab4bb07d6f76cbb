"""InstDisc: two ranks, accumulation, the bank, the proximal term."""

import math

import pytest
import torch

from conftest import Tiny
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.errors import UserError
from sslzoo.losses import unit
from sslzoo.methods.instdisc import InstDisc
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, momentum=0.9, weight_decay=1e-3)


def make(**options) -> InstDisc:
    return InstDisc(Tiny(norm=False), SGD, size=64, dim=8, **options).double()


def make_nce() -> InstDisc:
    return make(negatives=20, temperature=0.2, proximal=0.5)


def make_exact() -> InstDisc:
    return make(negatives=0)


def make_sampled_softmax() -> InstDisc:
    return make(negatives=20, softmax=True)


def make_with_z() -> InstDisc:
    method = make_nce()
    method.log_z.fill_(5.0)
    return method


def test_two_ranks_equal_one():
    batches = random_batches(5, 8, [(12,)])
    alone = train_alone(make_nce, batches)
    first, second = train_on_ranks(2, make_nce, batches)
    assert_same(alone, first)  # Z included
    assert torch.equal(first["state"]["bank.slots"], second["state"]["bank.slots"])


@pytest.mark.parametrize("make", [make_with_z, make_exact, make_sampled_softmax])
def test_accumulating_two_halves_equals_one_batch(make):
    # NCE from a Z that is set: it is estimated on the first batch, which would here be the first half.
    batches = random_batches(5, 8, [(12,)])
    assert_same(train_alone(make, batches), train_alone(make, batches, accumulate=2))


def test_z_is_kept_from_the_first_batch_and_saved():
    first, *more = random_batches(3, 8, [(12,)])
    method = make_nce()
    assert method.state_dict()["log_z"] == 0
    method.loss(first)
    z = method.state_dict()["log_z"].clone()
    assert z != 0
    for batch in more:
        method.loss(batch)
    assert method.log_z == z


def test_only_rows_of_visited_images_move_and_only_after_the_step():
    method, (batch,) = make_nce(), random_batches(1, 8, [(12,)])
    before = method.bank.slots.clone()
    f = unit(method.projector(method.encoder(batch.views[0]))).detach()
    method.loss(batch).backward()
    assert torch.equal(method.bank.slots, before)
    method.after_step()
    moved = (method.bank.slots != before).any(1)
    assert set(moved.nonzero().flatten().tolist()) == set(batch.index.tolist())
    torch.testing.assert_close(method.bank.slots[batch.index], unit(before[batch.index] + f))


def test_proximal_term_is_the_squared_distance_to_the_row_of_the_last_visit():
    (batch,) = random_batches(1, 8, [(12,)])
    plain, proximal = make(negatives=0), make(negatives=0, proximal=30.0)
    proximal.load_state_dict(plain.state_dict())
    f = unit(plain.projector(plain.encoder(batch.views[0])))
    distance = sum(((f[b] - plain.bank.slots[i]) ** 2).sum() for b, i in enumerate(batch.index)) / 8
    torch.testing.assert_close(proximal.loss(batch), plain.loss(batch) + 30 * distance)


@pytest.mark.parametrize(("make", "chance"), [(make_exact, math.log(64)), (make_sampled_softmax, math.log(21))])
def test_loss_at_chance_is_the_loss_of_equal_scores(make, chance):
    method, (batch,) = make(), random_batches(1, 8, [(12,)])
    method.bank.slots.zero_()
    assert method.loss(batch).item() == pytest.approx(method.loss_at_chance()) == pytest.approx(chance)


def test_nce_of_equal_scores_is_at_chance():
    method, (batch,) = make(negatives=20), random_batches(1, 8, [(12,)])
    method.bank.slots.zero_()
    assert method.loss(batch).item() == pytest.approx(method.loss_at_chance(), abs=1e-4)


@pytest.mark.parametrize("options", [{"size": None}, {"size": 64, "negatives": 65}, {"size": 64, "negatives": -1}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(UserError, match="number of training images"):
        InstDisc(Tiny(), SGD, **options)


def test_head_has_the_papers_number_of_parameters():
    encoder = torch.nn.Identity()
    encoder.dim = 2048
    assert sum(p.numel() for p in InstDisc(encoder, size=4096).projector.parameters()) == 262_272
