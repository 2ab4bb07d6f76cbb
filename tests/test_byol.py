"""BYOL: two ranks, more views, the target's momentum, norms."""

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from torch import nn

from conftest import Tiny, close
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.errors import UserError
from sslzoo.losses import unit
from sslzoo.methods.byol import BYOL, distance
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, momentum=0.9, weight_decay=1e-3)
TWO, THREE = [(12,)] * 2, [(12,)] * 3


def make(norm="batch") -> BYOL:
    return BYOL(Tiny(12, 64), SGD, dim=8, hidden=64, momentum=0.9, norm=norm).double()


def make_synced() -> BYOL:
    return sync_batchnorm(make())


def make_group() -> BYOL:
    return make("group")


def by_hand(method, views):
    """The mean over pairs, twice, from 2 - 2 cos."""
    cos = nn.CosineSimilarity(dim=1)
    p = [method.predictor(method.projector(method.encoder(x))) for x in views]
    z = [method.target(x) for x in views]
    pairs = [(i, j) for j in range(len(views)) for i in range(len(views)) if i != j]
    return 2 * sum((2 - 2 * cos(p[i], z[j])).mean() for i, j in pairs) / len(pairs)


def test_two_ranks_equal_one_with_three_views():
    batches = random_batches(5, 8, THREE)
    alone = train_alone(make_synced, batches)
    for rank in train_on_ranks(2, make_synced, batches):
        assert_same(alone, rank)


@pytest.mark.parametrize("shapes", [TWO, THREE])
def test_loss_is_the_papers_for_two_views_and_its_mean_over_pairs_for_more(shapes):
    method, (batch,) = make(), random_batches(1, 8, shapes)
    close(method.loss(batch), by_hand(method, batch.views))


def test_each_view_passes_batchnorm_alone():
    method, (batch,) = make(), random_batches(1, 8, TWO)
    method.loss(batch)
    assert method.encoder[1].num_batches_tracked == method.target.copies[0][1].num_batches_tracked == 2


def test_target_starts_as_a_copy_gets_no_gradient_and_follows_the_new_weights():
    method, (batch,) = make(), random_batches(1, 8, TWO)
    copy = method.target.copies[0][0].weight
    assert torch.equal(copy, method.encoder[0].weight)
    method.loss(batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    before = copy.clone()
    with torch.no_grad():
        method.encoder[0].weight += 1
    method.steps, method.step = 4, 0
    method.after_step()
    close(copy, before + 0.1)
    method.step = 2  # half-way up the cosine from 0.9 to 1
    before = copy.clone()
    method.after_step()
    close(copy, before.lerp(method.encoder[0].weight.detach(), 0.05))


def test_without_batch_statistics_accumulating_two_halves_equals_one_batch():
    batches = random_batches(5, 8, TWO)
    assert make_group().accumulates
    assert not make().accumulates
    assert_same(train_alone(make_group, batches), train_alone(make_group, batches, accumulate=2))


@pytest.mark.parametrize(
    ("norm", "kind"), [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm), ("group", nn.GroupNorm), (None, nn.ReLU)]
)
def test_norm_of_projector_and_predictor(norm, kind):
    method, (batch,) = make(norm), random_batches(1, 8, TWO)
    for head in (method.projector, method.predictor, method.target.copies[1]):
        assert type(head[1]) is kind
        assert head[0].bias is not None
        assert head[-1].bias is None
    bn = [part for part in method.modules() if isinstance(part, nn.BatchNorm1d)]
    assert bool(bn) == (norm != "group")  # elsewhere the encoder has one
    close(method.loss(batch), by_hand(method, batch.views))


def test_heads_have_the_papers_number_of_parameters():
    encoder = nn.Identity()
    encoder.dim = 2048
    method = BYOL(encoder)
    assert sum(p.numel() for p in method.projector.parameters()) == 9_449_472
    assert sum(p.numel() for p in method.predictor.parameters()) == 2_109_440


def test_distance_is_twice_one_plus_lightlys_negative_cosine():
    p, z = unit(torch.randn(8, 6)), unit(torch.randn(8, 6))
    torch.testing.assert_close(distance(p, z), 2 + 2 * NegativeCosineSimilarity()(p, z))


def test_bad_norm_and_a_single_view_are_refused():
    with pytest.raises(UserError, match="norm=instance is none of batch"):
        make("instance")
    with pytest.raises(UserError, match="BYOL compares views"):
        make().loss(random_batches(1, 8, [(12,)])[0])
