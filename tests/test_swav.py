"""SwAV: codes, loss, queue, two ranks, bad input."""

import math

import pytest
import torch
from lightly.loss.swav_loss import SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch.nn.functional import normalize

from conftest import Tiny
from ranks import assert_same, random_batches, train_alone, train_on_ranks
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.errors import UserError
from sslzoo.losses import swapped_cross_entropy
from sslzoo.memory import memory_buffers
from sslzoo.methods.swav import SwAV, sinkhorn
from sslzoo.optim import Optim

SGD = Optim(lr=0.1, lr_per=None, momentum=0.9, weight_decay=1e-3)
LARC = Optim(name="lars", lars="larc", lr=1.0, lr_per=None, weight_decay=1e-3)
CROPS = [(12,)] * 4


def make(optim=SGD, **options) -> SwAV:
    options = {"queue_size": 16, "queue_start": 0, "freeze_prototypes": 0} | options
    return SwAV(Tiny(), optim, hidden=10, dim=6, prototypes=7, **options).double()


def make_synced() -> SwAV:
    """The paper's BatchNorm is global; the trainer converts where there is more than one rank."""
    method = sync_batchnorm(make(LARC, freeze_prototypes=1))
    method.epochs = 5
    return method


# Sinkhorn


def slow_sinkhorn(scores, epsilon, iterations):
    """The paper's numpy-like code, appendix A.1, in the order it is printed."""
    q = (scores.double() / epsilon).exp().T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q *= (1 / k) / q.sum(1, keepdim=True)
        q *= (1 / b) / q.sum(0, keepdim=True)
    return (q / q.sum(0, keepdim=True)).T


@pytest.mark.parametrize("shape", [(8, 20), (40, 5), (1, 3), (9, 1)])
@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_sinkhorn_is_the_papers_pseudo_code(shape, iterations):
    scores = torch.randn(shape, dtype=torch.double)
    torch.testing.assert_close(sinkhorn(scores, 0.1, iterations), slow_sinkhorn(scores, 0.1, iterations))


def test_codes_are_distributions_that_use_all_prototypes_alike():
    codes = sinkhorn(torch.randn(60, 5, dtype=torch.double), 0.2, 200)
    torch.testing.assert_close(codes.sum(1), torch.ones(60).double())
    torch.testing.assert_close(codes.sum(0), torch.full((5,), 12.0).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_scores_of_any_size_and_type_give_finite_codes(dtype, scale):
    scores = (torch.rand(32, 9).clamp(max=0.9) * 2 - 1).mul(scale).to(dtype)
    codes = sinkhorn(scores, 0.05, 3)
    assert codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(codes).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(32, dtype=codes.dtype))
    torch.testing.assert_close(
        codes.double(), sinkhorn(scores.double(), 0.05, 3), atol=2e-2 if scale > 1e3 else 1e-3, rtol=0
    )


def test_a_shift_of_all_scores_changes_no_code():
    scores = torch.randn(8, 5, dtype=torch.double)
    torch.testing.assert_close(sinkhorn(scores + 1e4, 0.05, 3), sinkhorn(scores, 0.05, 3), rtol=1e-6, atol=1e-9)


def test_codes_carry_no_gradient():
    assert not sinkhorn(torch.randn(4, 3, requires_grad=True), 0.05, 3).requires_grad


def test_lightly_agrees_where_its_exponential_does_not_overflow():
    """Lightly's exp(scores / epsilon) is plain, in the scores' own type: infinite for a score of 5 at epsilon 0.05."""
    scores = torch.randn(16, 9).clamp(-1, 1)
    torch.testing.assert_close(sinkhorn(scores, 0.05, 3), lightly_sinkhorn(scores, 3, 0.05))
    scores[0, 0] = 5.0
    assert torch.isnan(lightly_sinkhorn(scores, 3, 0.05)).any()
    assert torch.isfinite(sinkhorn(scores, 0.05, 3)).all()


# Loss


def test_loss_is_the_mean_over_ordered_pairs_of_an_assigned_view_and_another():
    s, q = torch.randn(5, 4, 7, dtype=torch.double), torch.rand(2, 4, 7, dtype=torch.double).softmax(2)
    pairs = [(i, v) for i in range(2) for v in range(5) if i != v]
    losses = [-(q[i] * torch.log(torch.softmax(s[v] / 0.1, 1))).sum(1).mean() for i, v in pairs]
    assert len(losses) == 8
    torch.testing.assert_close(swapped_cross_entropy(s, q, 0.1), sum(losses) / 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_is_computed_in_float32(dtype):
    s, q = torch.randn(3, 4, 7).to(dtype), torch.rand(2, 4, 7).softmax(2)
    assert swapped_cross_entropy(s, q, 0.1).dtype == torch.float32
    torch.testing.assert_close(swapped_cross_entropy(s, q, 0.1), swapped_cross_entropy(s.float(), q, 0.1))


def test_lightly_has_the_same_loss_with_and_without_queue():
    """Lightly returns shape (1,), puts the queue after the batch and leaves filling it to the caller."""
    method, (batch,) = make(queue_size=0), random_batches(1, 8, CROPS)
    z = normalize(method.projector(method.encoder(torch.cat(batch.views))), dim=1).unflatten(0, (4, 8))
    s = method.prototypes(z)
    torch.testing.assert_close(method.loss(batch), SwaVLoss()([*s[:2]], [*s[2:]])[0])

    method = make(queue_size=16)
    s = method.prototypes(z)
    method.steps = method.epochs = 10
    method.step = 2  # two batches of eight have filled it
    queued = [method.prototypes(queue.keys) for queue in method.queues]
    torch.testing.assert_close(method.codes(s)[0], lightly_sinkhorn(torch.cat([s[0], queued[0]]), 3, 0.05)[:8])


def test_loss_under_bfloat16_autocast_keeps_scores_in_float32():
    method, (batch,) = make().float(), random_batches(1, 8, CROPS)
    batch = batch._replace(views=[x.float() for x in batch.views])
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(batch)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_loss_at_chance_is_the_loss_of_equal_scores():
    method, (batch,) = make(queue_size=0), random_batches(1, 8, CROPS)
    with torch.no_grad():
        method.prototypes.weight.copy_(method.prototypes.weight[:1].expand(7, -1))
    assert method.loss(batch).item() == pytest.approx(method.loss_at_chance()) == pytest.approx(math.log(7))


# What moves without a gradient


def test_prototypes_have_length_one_from_the_start_and_after_each_step():
    method = make(SGD)
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(7).double())
    state = train_alone(make, random_batches(3, 8, CROPS))["state"]
    torch.testing.assert_close(state["prototypes.weight"].norm(dim=1), torch.ones(7).double())


def frozen_for(optim, epochs):
    """After how many of 8 steps, 2 an epoch, the prototypes first move."""
    method = make(optim, freeze_prototypes=epochs, queue_size=0)
    optimizer = optim.build(method.parameter_groups())
    method.steps, method.epochs = 8, 4
    method.prototypes.normalise()  # again, in float64
    before = method.prototypes.weight.clone()
    for method.step, batch in enumerate(random_batches(8, 8, CROPS)):
        optimizer.zero_grad()
        method.loss(batch).backward()
        method.before_step()
        optimizer.step()
        method.after_step()
        if not torch.allclose(method.prototypes.weight, before, rtol=0, atol=1e-12):  # renormalising rounds
            return method.step
    return None


@pytest.mark.parametrize("optim", [SGD, LARC, Optim(name="adamw")])
@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (1, 2), (1.5, 3)])
def test_prototypes_stand_still_while_frozen_under_any_optimizer(optim, epochs, steps):
    assert frozen_for(optim, epochs) == steps


def test_queues_fill_from_their_epoch_on_and_are_used_once_full():
    method = make(queue_size=16, queue_start=2)
    method.steps, method.epochs = 10, 5  # from step 4; full after two batches of 8
    start, used = method.queues[0].keys.clone(), []
    sizes = []
    method.prototypes.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape))
    for method.step, batch in enumerate(random_batches(8, 8, CROPS)):
        sizes.clear()
        method.loss(batch)
        used.append(len(sizes) > 1)
        method.after_step()
        assert torch.equal(method.queues[0].keys, start) == (method.step < 4)
    assert used == [False] * 6 + [True] * 2


def test_each_full_view_has_a_queue_of_its_own_and_is_pushed_after_it_was_used():
    method, (batch,) = make(), random_batches(1, 8, CROPS)
    before = method.queues[0].keys.clone()
    method.loss(batch)
    assert torch.equal(method.queues[0].keys, before)
    z = [*method.fresh]
    method.after_step()
    for queue, pushed in zip(method.queues, z, strict=True):
        torch.testing.assert_close(queue.keys[:8], pushed)
    assert not torch.equal(method.queues[0].keys[:8], method.queues[1].keys[:8])


def test_queues_are_exempt_from_broadcast_and_absent_without_a_size():
    assert set(memory_buffers(make())) == {f"queues.{i}.{key}" for i in range(2) for key in ("keys", "pointer")}
    assert not memory_buffers(make(queue_size=0))


def test_two_ranks_equal_one_with_multicrop_queue_and_frozen_prototypes():
    batches = random_batches(5, 8, CROPS)
    alone = train_alone(make_synced, batches)
    first, second = train_on_ranks(2, make_synced, batches)
    assert_same(alone, first)
    assert_same(alone, second)
    assert torch.equal(first["state"]["queues.0.keys"], second["state"]["queues.0.keys"])


# Mistakes and sizes


def test_one_view_is_refused():
    with pytest.raises(UserError, match="SwAV compares views of an image but the configured views give 1"):
        make().loss(random_batches(1, 8, [(12,)])[0])


@pytest.mark.parametrize("options", [{"iterations": 0}, {"epsilon": 0.0}])
def test_settings_that_give_no_codes_are_refused(options):
    with pytest.raises(UserError, match="give no codes; Sinkhorn needs at least 1 iteration"):
        make(**options)


def test_two_views_without_small_crops_are_enough():
    assert torch.isfinite(make().loss(random_batches(1, 8, CROPS[:2])[0]))


def test_head_has_the_papers_number_of_parameters():
    encoder = torch.nn.Identity()
    encoder.dim = 2048
    method = SwAV(encoder)
    assert sum(p.numel() for p in method.projector.parameters()) == 4_462_720
    assert sum(p.numel() for p in method.prototypes.parameters()) == 384_000
