"""Noise-contrastive estimation with a constant Z: values, half precision."""

import math

import pytest
import torch

from sslzoo.losses import candidate_scores, first_of, nce, nce_at_chance, nce_log_z


def unit_rows(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


def slow_nce(scores, z, size):
    total, m = 0.0, scores.shape[1] - 1
    for row in scores.tolist():
        p = [math.exp(s) / z for s in row]
        total -= math.log(p[0] / (p[0] + m / size + 1e-7))
        total -= sum(math.log(m / size / (q + m / size + 1e-7)) for q in p[1:])
    return total / len(scores)


@pytest.mark.parametrize(("batch", "m", "size", "temperature"), [(5, 7, 40, 0.07), (3, 40, 41, 0.5), (2, 1, 1000, 0.1)])
def test_nce_is_the_papers_formula(batch, m, size, temperature):
    scores = candidate_scores(unit_rows(batch, 16), unit_rows(batch, 1 + m, 16), temperature)
    log_z = nce_log_z(scores, torch.zeros((), dtype=torch.double), size)
    z = sum(math.exp(s) for s in scores.flatten().tolist()) / scores.numel() * size
    assert log_z.exp().item() == pytest.approx(z, rel=1e-12)
    assert nce(scores, log_z, size).item() == pytest.approx(slow_nce(scores, z, size), rel=1e-11)


def test_scores_of_own_candidates_and_of_shared_ones():
    f, v = unit_rows(4, 8), unit_rows(6, 8)
    shared = candidate_scores(f, v, 0.1)
    torch.testing.assert_close(shared, candidate_scores(f, v.expand(4, 6, 8), 0.1))
    assert shared[2, 3].item() == pytest.approx(sum(f[2, k].item() * v[3, k].item() for k in range(8)) / 0.1)


def test_z_once_set_stays():
    log_z = torch.tensor(3.0)
    assert nce_log_z(torch.randn(4, 5), log_z, 100) == log_z


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_float32_value_of_its_inputs(dtype):
    f = unit_rows(8, 16).to(dtype).requires_grad_()
    v = unit_rows(8, 33, 16).to(dtype)
    v[:, 0] = f.detach()  # scores up to 1 / 0.05 = 20, whose exponential float16 cannot hold
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = candidate_scores(f, v, 0.05)
        log_z = nce_log_z(scores, torch.zeros((), dtype=dtype), 10**6)
        loss = nce(scores, log_z, 10**6)
    expected = candidate_scores(f.detach().float(), v.float(), 0.05)
    torch.testing.assert_close(loss, nce(expected, log_z, 10**6))
    loss.backward()
    assert torch.isfinite(f.grad).all()
    assert torch.isfinite(log_z)


def test_nothing_overflows_where_probabilities_are_beyond_float32():
    scores = torch.tensor([[200.0, -200.0, 200.0], [-200.0, 0.0, 0.0]], requires_grad=True)
    loss = nce(scores, torch.tensor(12.0), 1000)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


def test_softmax_over_candidates_is_cross_entropy_with_class_zero():
    scores = torch.randn(6, 9)
    torch.testing.assert_close(first_of(scores), torch.nn.functional.cross_entropy(scores, torch.zeros(6).long()))


def test_chance_is_the_least_loss_of_equal_scores():
    m, size = 12, 50
    losses = [nce(torch.full((2, 1 + m), s), torch.tensor(math.log(size)), size) for s in torch.linspace(-1, 1, 41)]
    assert min(losses).item() == pytest.approx(nce_at_chance(m), abs=1e-4)
    assert losses.index(min(losses)) == 20  # at P = 1 / N, which is where Z puts equal scores
