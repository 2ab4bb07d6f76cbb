"""SimSiam: two ranks, more views, the predictor's rate, ablations."""

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from torch import nn

from conftest import Tiny, close
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.errors import UserError
from sslzoo.methods.simsiam import SimSiam, negative_cosine
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, momentum=0.9, weight_decay=1e-3)
TWO, THREE = [(12,)] * 2, [(12,)] * 3
ARGUMENTS = {"stop_gradient": True, "predictor": True, "constant_predictor_lr": True, "last_norm": "batch_no_affine"}


def make(**changed) -> SimSiam:
    return SimSiam(Tiny(), SGD, dim=10, bottleneck=4, **(ARGUMENTS | changed)).double()


def make_synced() -> SimSiam:
    return sync_batchnorm(make())


def by_hand(method, views):
    cos = nn.CosineSimilarity(dim=1)
    z = [method.projector(method.encoder(x)) for x in views]
    p = [method.predictor(x) for x in z]
    pairs = [(i, j) for j in range(len(views)) for i in range(len(views)) if i != j]
    return -sum(cos(p[i], z[j].detach()).mean() for i, j in pairs) / len(pairs)


def test_two_ranks_equal_one_with_three_views():
    batches = random_batches(5, 8, THREE)
    alone = train_alone(make_synced, batches)
    for rank in train_on_ranks(2, make_synced, batches):
        assert_same(alone, rank)


@pytest.mark.parametrize("shapes", [TWO, THREE])
def test_loss_is_the_papers_for_two_views_and_its_mean_over_pairs_for_more(shapes):
    method, (batch,) = make(), random_batches(1, 8, shapes)
    loss, expected = method.loss(batch), by_hand(method, batch.views)
    close(loss, expected)
    weight = method.encoder[0].weight
    close(*(torch.autograd.grad(value, weight)[0] for value in (loss, expected)))


def test_each_view_passes_batchnorm_alone():
    method, (batch,) = make(), random_batches(1, 8, TWO)
    method.loss(batch)
    assert method.encoder[1].num_batches_tracked == method.projector[7].num_batches_tracked == 2


def test_without_stop_gradient_the_loss_is_equal_and_its_gradient_is_not():
    (batch,) = random_batches(1, 8, TWO)
    grads, losses = [], []
    for stop in (True, False):
        torch.manual_seed(0)
        method = make(stop_gradient=stop)
        losses.append(method.loss(batch))
        losses[-1].backward()
        grads.append(method.encoder[0].weight.grad)
    close(*losses)
    assert not torch.allclose(*grads)


def test_without_predictor_projections_are_compared():
    method, (batch,) = make(predictor=False), random_batches(1, 8, TWO)
    z1, z2 = (method.projector(method.encoder(x)) for x in batch.views)
    close(method.loss(batch), -nn.CosineSimilarity(dim=1)(z1, z2).mean())
    SGD.build(method.parameter_groups())


@pytest.mark.parametrize(("last_norm", "last"), [("batch_no_affine", 7), ("batch", 7), (None, 6)])
def test_bias_before_the_last_norm_is_frozen(last_norm, last):
    method = make(last_norm=last_norm)
    assert len(method.projector) == last + 1
    assert method.projector[6].bias.requires_grad == (last_norm is None)


@pytest.mark.parametrize("constant", [True, False])
def test_rate_of_the_predictor(constant):
    method = make(constant_predictor_lr=constant)
    optimizer = SGD.build(method.parameter_groups())
    SGD.set(optimizer, 50, 100, 10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(method.encoder[0].weight)] == pytest.approx(0.05)
    assert rates[id(method.predictor[0].weight)] == pytest.approx(0.1 if constant else 0.05)
    assert len(rates) == sum(p.requires_grad for p in method.parameters())


def test_heads_have_the_papers_number_of_parameters():
    encoder = nn.Identity()
    encoder.dim = 2048
    method = SimSiam(encoder)
    assert sum(p.numel() for p in method.projector.parameters() if p.requires_grad) == 12_591_104
    assert sum(p.numel() for p in method.predictor.parameters()) == 2_100_224


def test_loss_is_lightlys():
    p, z = torch.randn(8, 6), torch.randn(8, 6)
    torch.testing.assert_close(negative_cosine(p, z), NegativeCosineSimilarity()(p, z))


def test_one_view_is_refused():
    with pytest.raises(UserError, match="SimSiam compares views"):
        make().loss(random_batches(1, 8, [(12,)])[0])
