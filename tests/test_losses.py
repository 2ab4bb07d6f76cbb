"""Shared losses: naive loops in float64, half precision, two ranks, lightly."""

import pytest
import torch
from torch.nn.functional import log_softmax, normalize

from conftest import close, on_ranks
from sslzoo import dist
from sslzoo.losses import full, info_nce, nt_xent, over_pairs, swapped_cross_entropy, unit


def rows(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


def picked(own: torch.Tensor, others: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """``-log`` of the share of ``own`` among itself and ``others``, all of them similarities."""
    weights = [(s / temperature).exp() for s in [own, *others]]
    return -(weights[0] / sum(weights)).log()


def slow_info_nce(q, k, negatives, temperature):
    losses = [picked(q[i] @ k[i], [q[i] @ n for n in negatives], temperature) for i in range(len(q))]
    return sum(losses) / len(q)


def slow_nt_xent(z1, z2, temperature, negatives=()):
    z, b, losses = torch.cat([z1, z2]), len(z1), []
    for i in range(2 * b):
        twin = (i + b) % (2 * b)
        others = [z[i] @ z[j] for j in range(2 * b) if j not in (i, twin)] + [z[i] @ n for n in negatives]
        losses.append(picked(z[i] @ z[twin], others, temperature))
    return sum(losses) / len(losses)


def assert_equal_with_gradients(fast, slow, *inputs):
    found = []
    for loss in (fast, slow):
        own = [x.clone().requires_grad_() for x in inputs]
        value = loss(*own)
        value.backward()
        found.append([value.detach(), *(x.grad for x in own)])
    for got, expected in zip(*found, strict=True):
        close(got, expected)


@pytest.mark.parametrize(("b", "k", "temperature"), [(5, 7, 0.07), (1, 1, 1.0), (3, 11, 0.2)])
def test_info_nce_and_all_its_gradients_equal_a_double_loop(b, k, temperature):
    assert_equal_with_gradients(
        lambda *x: info_nce(*x, temperature),
        lambda *x: slow_info_nce(*x, temperature),
        *(rows(b, 6), rows(b, 6), rows(k, 6)),
    )


def test_info_nce_takes_features_of_any_length():
    q, k, negatives = 3 * rows(4, 6), 0.5 * rows(4, 6), 2 * rows(5, 6)
    close(info_nce(q, k, negatives, 0.5), slow_info_nce(q, k, negatives, 0.5))


@pytest.mark.parametrize(("b", "temperature"), [(5, 0.1), (2, 0.5), (1, 1.0)])
def test_nt_xent_and_its_gradients_equal_a_double_loop(b, temperature):
    views = rows(b, 6), rows(b, 6)
    assert_equal_with_gradients(lambda *z: nt_xent(*z, temperature), lambda *z: slow_nt_xent(*z, temperature), *views)


def test_nt_xent_with_a_memory_counts_its_rows_among_the_negatives():
    memory = rows(7, 6)
    assert_equal_with_gradients(
        lambda *z: nt_xent(*z, 0.2, memory), lambda *z: slow_nt_xent(*z, 0.2, memory), rows(4, 6), rows(4, 6)
    )


def test_a_single_pair_has_nothing_to_be_told_from():
    assert nt_xent(rows(1, 6), rows(1, 6), 0.1) == 0


HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@HALF
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gives_the_float32_value_of_its_inputs(dtype, autocast):
    q, k, negatives = (rows(n, 16).to(dtype).requires_grad_() for n in (8, 8, 33))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = info_nce(q, k, negatives, 0.01), nt_xent(q, k, 0.01, negatives)
    exact = [x.detach().double() for x in (q, k, negatives)]
    close(losses[0].double(), info_nce(*exact, 0.01), rtol=1e-5)
    close(losses[1].double(), nt_xent(*exact[:2], 0.01, exact[2]), rtol=1e-5)
    sum(losses).backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.any() for x in (q, k, negatives))


def test_float32_within_autocast_is_not_rounded_to_bfloat16():
    q, k, negatives = (rows(n, 16).float() for n in (8, 8, 33))
    plain = info_nce(q, k, negatives, 0.07), nt_xent(q, k, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (info_nce(q, k, negatives, 0.07), nt_xent(q, k, 0.07)) == plain


@HALF
def test_only_half_precision_is_widened(dtype):
    assert full(torch.ones(2, dtype=dtype)).dtype == torch.float32
    x = torch.ones(2, dtype=torch.double)
    assert full(x) is x


@HALF
def test_unit_rows_have_length_one_to_float32(dtype):
    x = 100 * torch.randn(5, 300).to(dtype)  # a float16 sum of squares would overflow
    close(unit(x).norm(dim=1), torch.ones(5), rtol=1e-6)
    assert not unit(torch.zeros(1, 3, dtype=dtype)).any()


def loss_of_rank(x1, x2, w, memory):
    """The loss of this rank's rows, and its gradients to the shared weights and to those rows."""
    w, x1, x2 = w.clone().requires_grad_(), dist.mine(x1).requires_grad_(), dist.mine(x2).requires_grad_()
    loss = nt_xent(normalize(x1 @ w, dim=1), normalize(x2 @ w, dim=1), 0.2, memory)
    loss.backward()
    return loss.detach(), w.grad, x1.grad, x2.grad


def with_and_without_memory(rank, *given):
    return loss_of_rank(*given[:3], None), loss_of_rank(*given)


def test_two_ranks_of_nt_xent_average_to_one_rank_of_both_batches():
    given = [torch.randn(*shape, dtype=torch.double) for shape in ((8, 6), (8, 6), (6, 4))]
    given.append(rows(5, 4))
    alone = with_and_without_memory(0, *given)
    for whole, first, second in zip(alone, *on_ranks(2, with_and_without_memory, *given), strict=True):
        for one, a, b in zip(whole[:2], first, second, strict=False):
            close((a + b) / 2, one)  # the value, and what DDP makes of the ranks' gradients
            assert not torch.allclose(a, b)  # each rank has anchors of its own
        for one, a, b in zip(whole[2:], first[2:], second[2:], strict=True):
            close(torch.cat([a, b]) / 2, one)  # a row's gradient comes from the anchors of both ranks


def test_nt_xent_is_lightlys_where_its_inputs_are_normalised():
    from lightly.loss import NTXentLoss

    z1, z2 = torch.randn(6, 8, dtype=torch.double), torch.randn(6, 8, dtype=torch.double)
    close(nt_xent(unit(z1), unit(z2), 0.3), NTXentLoss(temperature=0.3)(z1, z2))


def test_info_nce_is_lightlys_with_a_memory_bank():
    from lightly.loss import NTXentLoss

    theirs = NTXentLoss(temperature=0.3, memory_bank_size=(12, 8))
    keys = theirs.memory_bank.bank = rows(12, 8)
    q, k = torch.randn(4, 8, dtype=torch.double), torch.randn(4, 8, dtype=torch.double)
    close(info_nce(unit(q), unit(k), keys, 0.3), theirs(q, k))


@pytest.mark.parametrize(("views", "targets"), [(2, 2), (5, 2), (3, 1)])
def test_swapped_cross_entropy_is_the_mean_over_pairs_of_different_views(views, targets):
    scores = torch.randn(views, 4, 6, dtype=torch.double)
    codes = torch.randn(targets, 4, 6, dtype=torch.double).softmax(2)
    pairs = [(i, v) for i in range(targets) for v in range(views) if i != v]
    terms = [-(codes[i, b] * log_softmax(scores[v, b] / 0.1, 0)).sum() for i, v in pairs for b in range(4)]
    close(swapped_cross_entropy(scores, codes, 0.1), sum(terms) / len(terms))


def test_over_pairs_means_each_target_against_each_other_prediction():
    seen = []

    def product(p, t):
        seen.append((p.item(), t.item()))
        return p * t

    found = over_pairs(product, list(torch.tensor([2.0, 3.0, 5.0])), list(torch.tensor([7.0, 11.0])))
    assert sorted(seen) == [(2, 11), (3, 7), (5, 7), (5, 11)]
    assert found.item() == (2 * 11 + 3 * 7 + 5 * 7 + 5 * 11) / 4
