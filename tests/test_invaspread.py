"""InvaSpread: the formula, whose gradient flows where, two ranks."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from conftest import Tiny
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.methods.invaspread import InvaSpread, invaspread
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, momentum=0.9, weight_decay=1e-3)


def make() -> InvaSpread:
    return InvaSpread(Tiny(norm=False), SGD, dim=8, negative_weight=2.0).double()


def pair(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    z1, z2 = normalize(torch.randn(2, batch, 8, dtype=torch.double), dim=2)
    return z1.clone().requires_grad_(), z2.clone().requires_grad_()


def slow(z1, z2, temperature, m=1.0):
    z, b = torch.cat([z1, z2]), len(z1)
    total = 0.0
    for i in range(2 * b):
        twin = (i + b) % (2 * b)
        s = [math.exp((z[i] @ z[j]).item() / temperature) for j in range(2 * b)]
        below = s[twin] + m * (sum(s) - s[i] - s[twin])
        total += math.log(s[twin] / below)
        total += m * sum(math.log(1 - s[j] / below) for j in range(2 * b) if j not in (i, twin))
    return -total / (2 * b)


@pytest.mark.parametrize(("temperature", "m"), [(0.1, 1.0), (0.5, 1.0), (0.5, 3.0)])
def test_loss_is_the_papers_formula(temperature, m):
    z1, z2 = pair()
    assert invaspread(z1, z2, temperature, m).item() == pytest.approx(slow(z1, z2, temperature, m), rel=1e-10)


def test_what_an_anchor_is_compared_with_receives_no_gradient():
    z1, z2 = pair()
    invaspread(z1, z2, 0.1).backward()
    free = torch.cat([z1, z2]).detach()
    for i in range(len(free)):
        anchor = free[i].clone().requires_grad_()
        scores = (anchor @ free.T / 0.1).scatter(0, torch.tensor(i), float("-inf"))
        p = scores.softmax(0)
        twin = (i + len(z1)) % len(free)
        loss = -(p[twin].log() + (1 - p).log().sum() - (1 - p[twin]).log()) / len(free)
        (expected,) = torch.autograd.grad(loss, anchor)
        torch.testing.assert_close(torch.cat([z1.grad, z2.grad])[i], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_image_alike_and_all_others_far_is_finitely_bad(dtype):
    z1 = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=dtype, requires_grad=True)
    z2 = torch.tensor([[-1.0, 0.0], [-1.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = invaspread(z1, z2, 0.02)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z1.grad).all()
    assert torch.isfinite(z2.grad).all()


def test_two_ranks_equal_one():
    batches = random_batches(5, 8, [(12,), (12,)])
    alone = train_alone(make, batches)
    for rank in train_on_ranks(2, make, batches):
        assert_same(alone, rank)


def test_batch_is_not_to_be_accumulated_and_is_normalised_as_a_whole():
    assert not InvaSpread.accumulates
    assert InvaSpread.sync_batchnorm
    method, (batch,) = InvaSpread(Tiny(), SGD, dim=8).double(), random_batches(1, 8, [(12,), (12,)])
    method.loss(batch)
    mean = method.encoder[0](torch.cat(batch.views)).mean(0)
    torch.testing.assert_close(method.encoder[1].running_mean, 0.1 * mean)
