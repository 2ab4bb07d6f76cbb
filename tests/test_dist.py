"""Collectives: values and gradients on two ranks, identities on one, who is normalised with whom."""

import pytest
import torch

from conftest import close, on_ranks
from sslzoo import dist

X = torch.arange(24, dtype=torch.double).view(8, 3).square() % 11
WEIGHTS = torch.linspace(-1, 2, 48, dtype=torch.double).view(2, 8, 3)  # one rank weighs rows as the other does not
ORDER = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])


def centred(x):
    """What BatchNorm does to a batch, as far as these tests care."""
    return x - x.mean(0)


def collect(rank):
    """Every collective on this rank's share of X."""
    x = dist.mine(X)
    gathered, summed = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole = dist.all_gather_with_grad(gathered)
    (whole * WEIGHTS[rank]).square().sum().backward()
    total = dist.all_sum_with_grad(summed)
    (total * WEIGHTS[rank, : len(x)]).square().sum().backward()
    tracked = x.clone().requires_grad_()
    kept, broadcast = x.clone(), x.clone()
    sums = dist.all_sum(kept), dist.all_mean(tracked)
    untracked = [*sums, dist.all_gather(tracked), dist.shuffled(centred, tracked, ORDER)]
    dist.from_rank_zero(broadcast)
    return {
        "world": (dist.world(), dist.rank()),
        "mine": x,
        "all_gather": dist.all_gather(tracked),
        "strided": dist.all_gather(x.T.contiguous().T),
        "scalar rows": dist.all_gather(torch.tensor([10 + rank])),
        "all_sum": sums[0],
        "left as it was": torch.equal(kept, x),
        "all_mean": sums[1],
        "broadcast": broadcast,
        "gathered with gradient": (whole.detach(), gathered.grad),
        "summed with gradient": (total.detach(), summed.grad),
        "shuffled": dist.shuffled(centred, x, ORDER),
        "order undone": dist.shuffled(lambda rows: rows, x, ORDER),
        "tracked": any(t.requires_grad for t in untracked),
    }


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(2, collect)


def test_ranks_hold_their_rows_in_order(ranks):
    assert [found["world"] for found in ranks] == [(2, 0), (2, 1)]
    assert torch.equal(torch.cat([found["mine"] for found in ranks]), X)


def test_gathering_gives_every_rank_all_rows_by_rank(ranks):
    for found in ranks:
        assert torch.equal(found["all_gather"], X)
        assert torch.equal(found["strided"], X)
        assert found["scalar rows"].tolist() == [10, 11]


def test_sums_and_means_are_over_ranks_and_leave_their_input(ranks):
    for found in ranks:
        assert torch.equal(found["all_sum"], X[:4] + X[4:])
        assert torch.equal(found["all_mean"], (X[:4] + X[4:]) / 2)
        assert found["left as it was"]
        assert torch.equal(found["broadcast"], X[:4])
        assert not found["tracked"]


def test_gradient_through_gathering_is_the_sum_over_the_losses_of_all_ranks(ranks):
    x = X.clone().requires_grad_()
    sum((x * w).square().sum() for w in WEIGHTS).backward()
    for rank, found in enumerate(ranks):
        whole, grad = found["gathered with gradient"]
        assert torch.equal(whole, X)
        close(grad, x.grad[4 * rank : 4 * rank + 4])


def test_gradient_through_summing_is_the_sum_over_the_losses_of_all_ranks(ranks):
    x = X.clone().requires_grad_()
    sum(((x[:4] + x[4:]) * w[:4]).square().sum() for w in WEIGHTS).backward()
    for rank, found in enumerate(ranks):
        total, grad = found["summed with gradient"]
        assert torch.equal(total, X[:4] + X[4:])
        close(grad, x.grad[4 * rank : 4 * rank + 4])


def grouped(x, order, groups):
    """Each row minus the mean of those that share its group, groups being consecutive runs of ``order``."""
    result, size = torch.empty_like(x), len(x) // groups
    for g in range(groups):
        members = order[g * size : (g + 1) * size].tolist()
        mean = sum(x[i] for i in members) / size
        for i in members:
            result[i] = x[i] - mean
    return result


def test_shuffling_normalises_a_key_with_a_random_share_and_undoes_the_order(ranks):
    expected = grouped(X, ORDER, 2)
    close(torch.cat([found["shuffled"] for found in ranks]), expected)
    close(collect(0)["shuffled"], grouped(X, ORDER, 1))
    assert not torch.allclose(expected, grouped(X, torch.arange(8), 2))


def test_order_is_undone_to_the_bit(ranks):
    assert torch.equal(torch.cat([found["order undone"] for found in ranks]), X)


def test_one_rank_is_a_world_where_every_collective_is_the_identity():
    found = collect(0)
    assert found["world"] == (1, 0)
    for name in ("mine", "all_gather", "strided", "all_sum", "all_mean", "broadcast", "order undone"):
        assert torch.equal(found[name], X), name
    assert not found["tracked"]
    for name in ("gathered with gradient", "summed with gradient"):
        assert torch.equal(found[name][0], X)
        close(found[name][1], 2 * X * WEIGHTS[0].square())
    x = X.clone()
    assert dist.all_sum(x).data_ptr() != x.data_ptr()  # a caller may change it
