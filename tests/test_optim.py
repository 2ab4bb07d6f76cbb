"""Schedules at their ends, parameter groups, rates by batch, LARS without a host sync and through a checkpoint."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from conftest import close
from sslzoo.errors import UserError
from sslzoo.optim import LARS, Optim, clip_each, cosine, stepwise, warmup_cosine

# Schedules


def test_cosine_starts_ends_and_is_halfway_in_the_middle():
    assert cosine(0.3, 0.1, 0) == 0.3
    assert cosine(0.3, 0.1, 1) == pytest.approx(0.1)
    assert cosine(0.3, 0.1, 0.5) == pytest.approx(0.2)
    assert cosine(0.996, 1.0, 1 / 3) == pytest.approx(1 - 0.004 * (math.cos(math.pi / 3) + 1) / 2)


def test_warm_up_is_linear_and_meets_the_cosine_at_the_peak():
    rates = [warmup_cosine(step, 20, 5, 1.0, 0.1, 0.2) for step in range(21)]
    assert rates[:6] == pytest.approx([0.2, 0.36, 0.52, 0.68, 0.84, 1.0])
    assert rates[20] == pytest.approx(0.1)
    assert rates[12] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 7 / 15)) / 2)
    assert all(a > b for a, b in pairwise(rates[5:]))


def test_inclusive_warm_up_reaches_the_peak_on_its_last_step_and_repeats_it():
    rates = [warmup_cosine(step, 10, 4, 3.0, inclusive=True) for step in range(6)]
    assert rates[:5] == pytest.approx([0, 1, 2, 3, 3])
    assert rates[5] < 3


def test_warm_up_of_no_or_one_step_and_a_run_of_nothing_else():
    assert warmup_cosine(0, 10, 0, 1.0) == 1
    assert warmup_cosine(0, 10, 1, 1.0, inclusive=True) == 0
    assert warmup_cosine(1, 10, 1, 1.0, inclusive=True) == 1
    assert warmup_cosine(3, 4, 4, 1.0) == 0.75
    assert warmup_cosine(4, 4, 4, 1.0, end=0.5) == 0.5


def test_beyond_its_end_a_schedule_stays_there():
    assert warmup_cosine(15, 10, 2, 1.0, end=0.25) == pytest.approx(0.25)


def test_stepwise_falls_on_reaching_a_milestone():
    rates = [stepwise(epoch, 8.0, (2, 3), 0.5) for epoch in (0, 1, 1.99, 2, 2.5, 3, 9)]
    assert rates == [8, 8, 8, 4, 4, 2, 2]


def test_rate_by_recipe_warms_up_over_epochs_and_ends_at_a_share_of_the_peak():
    optim = Optim(lr=0.5, lr_per=None, warmup_epochs=2, start_lr=0.1, final_lr=0.01)
    rates = [optim.lr_at(step, 40, 4) for step in range(41)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[4] == pytest.approx(0.275)
    assert rates[8] == pytest.approx(0.5)
    assert rates[40] == pytest.approx(0.005)


def test_fractional_warm_up_and_epochs():
    optim = Optim(lr=1.0, lr_per=None, warmup_epochs=0.5)
    assert optim.lr_at(2, 20, 7.0) == pytest.approx(0.5)  # half of seven steps is four
    assert optim.lr_at(4, 20, 7.0) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_a_rate_per_epoch_stands_still_within_one(schedule):
    optim = Optim(lr=1.0, lr_per=None, schedule=schedule, milestones=(0.5, 0.75), per_epoch=True)
    rates = [optim.lr_at(step, 40, 5) for step in range(40)]
    epochs = [rates[5 * epoch] for epoch in range(8)]
    assert rates == [rate for rate in epochs for _ in range(5)]
    meant = {"cosine": [cosine(1.0, 0.0, e / 8) for e in range(8)], "step": [1] * 4 + [0.1] * 2 + [0.01] * 2}
    assert epochs == pytest.approx(meant[schedule])


def test_a_warm_up_per_epoch_counts_epochs():
    optim = Optim(lr=1.0, lr_per=None, warmup_epochs=2, per_epoch=True)
    assert [optim.lr_at(step, 40, 5) for step in (0, 4, 5, 9, 10)] == pytest.approx([0, 0, 0.5, 0.5, 1])


@pytest.mark.parametrize(("epochs", "milestones"), [(200, (120, 160)), (100, (60, 80)), (240, (120, 160, 200))])
def test_milestones_as_fractions_fall_on_the_papers_epochs(epochs, milestones):
    fractions = tuple(milestone / epochs for milestone in milestones)
    optim = Optim(lr=1.0, lr_per=None, schedule="step", milestones=fractions, per_epoch=True)
    for epoch in range(epochs):
        assert optim.lr_at(epoch * 7, epochs * 7, 7) == stepwise(epoch, 1.0, milestones)


def test_constant_is_constant():
    assert {Optim(lr=0.2, batch_size=512, schedule="constant").lr_at(step, 9, 3) for step in range(9)} == {0.4}


def test_weight_decay_stays_or_goes_by_half_a_cosine():
    assert [Optim(weight_decay=0.1).weight_decay_at(t) for t in (0, 0.5, 1)] == [0.1] * 3
    rising = [Optim(weight_decay=0.04, final_weight_decay=0.4).weight_decay_at(t) for t in (0, 0.5, 1)]
    assert rising == pytest.approx([0.04, 0.22, 0.4])


@pytest.mark.parametrize(
    ("options", "peak"),
    [
        ({"lr": 0.03, "batch_size": 1024}, 0.12),
        ({"lr": 0.3, "batch_size": 64, "lr_per": 512}, 0.0375),
        ({"lr": 0.075, "batch_size": 4096, "lr_scaling": "sqrt"}, 4.8),
        ({"lr": 0.03, "batch_size": 1024, "lr_per": None}, 0.03),
    ],
)
def test_peak_rate_scales_with_the_batch(options, peak):
    assert Optim(**options).peak_lr == pytest.approx(peak)


@pytest.mark.parametrize("key", ["name", "lr_scaling", "exclude", "schedule", "lars"])
def test_an_unknown_choice_lists_the_known_ones(key):
    with pytest.raises(UserError, match=rf"optim\.{key}=nonsense is none of \w+, \w+"):
        Optim(**{key: "nonsense"})


# Groups


def net() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    module[3].bias.requires_grad_(False)
    return module


def test_nothing_is_excluded_by_default_but_what_is_frozen():
    module = net()
    (group,) = Optim().groups(module.parameters())
    assert [id(p) for p in group["params"]] == [id(p) for p in list(module.parameters())[:5]]
    assert group["decay"]


def test_biases_and_norms_form_a_group_without_decay():
    module = net()
    options = Optim(exclude="bias_and_norm", weight_decay=0.1)
    optimizer = options.build(options.groups(module.parameters(), note="kept"))
    large, small = optimizer.param_groups
    assert {id(p) for p in large["params"]} == {id(module[0].weight), id(module[3].weight)}
    assert {id(p) for p in small["params"]} == {id(module[0].bias), id(module[1].weight), id(module[1].bias)}
    assert (large["weight_decay"], small["weight_decay"]) == (0.1, 0.0)
    assert large["note"] == small["note"] == "kept"


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_each_optimizer_spares_the_excluded_from_decay(name):
    module = nn.Linear(4, 4)
    optim = Optim(name=name, lr=0.1, lr_per=None, weight_decay=0.5, exclude="bias_and_norm", betas=(0.8, 0.9))
    optimizer = optim.build(optim.groups(module.parameters()))
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(module.bias, before["bias"])
    moved = {"sgd": 1 - 0.05, "adamw": 1 - 0.05, "lars": 1 - 0.1 * 1e-3}[name]  # trust is 1e-3 |w| / |wd w|
    close(module.weight.detach(), before["weight"] * moved, rtol=1e-5, atol=1e-7)
    if name == "adamw":
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_lars_excludes_what_the_recipe_excludes_and_nothing_else():
    for exclude, spared in (("none", [False]), ("bias_and_norm", [False, True])):
        optim = Optim(name="lars", exclude=exclude)
        optimizer = optim.build(optim.groups(net().parameters()))
        assert [group["exclude"] for group in optimizer.param_groups] == spared


def test_set_writes_rate_and_decay_of_the_step_and_spares_constant_rates():
    optim = Optim(lr=1.0, lr_per=None, weight_decay=0.04, final_weight_decay=0.4, exclude="bias_and_norm")
    module, head = net(), nn.Linear(2, 2)
    groups = [*optim.groups(module.parameters()), *optim.groups(head.parameters(), constant_lr=True)]
    optimizer = optim.build(groups)
    optim.set(optimizer, 5, 10, 2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5, 1.0, 1.0])
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.22, 0, 0.22, 0])


# LARS


def parameters(dtype=torch.double):
    return [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in ((4, 3), (5,), (2, 3, 3, 3))]


def give_gradients(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for w in weights:
        w.grad = torch.randn(w.shape, generator=generator, dtype=torch.double).to(w.dtype)


FORMS = [
    {"form": "classic"},
    {"form": "classic", "nesterov": True},
    {"form": "popular"},
    {"form": "popular", "adapt_after_momentum": True},
    {"form": "larc"},
    {"form": "larc", "clip": True},
]


@pytest.mark.parametrize("form", ["classic", "popular", "larc"])
def test_three_steps_of_lars_are_the_formula_applied_to_each_tensor(form):
    weights = parameters()
    weights[2].data.zero_()  # no norm to measure trust by
    optimizer = LARS(weights, lr=0.1, momentum=0.9, weight_decay=0.2, form=form)
    slow, velocity = [w.detach().clone() for w in weights], [0] * 3
    for step, lr in enumerate((0.1, 0.3, 0.2)):
        give_gradients(weights, step)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for i, weight in enumerate(weights):
            w, g = slow[i], weight.grad
            if form != "larc" and w.ndim == 1:
                u, trust = g, 1
            else:
                u = g + 0.2 * w
                below = g.norm() + 0.2 * w.norm() + 1e-8 if form == "larc" else u.norm()
                trust = 1e-3 * w.norm() / below if w.norm() > 0 else 1
            velocity[i] = 0.9 * velocity[i] + trust * u * (lr if form == "classic" else 1)
            slow[i] = w - velocity[i] * (1 if form == "classic" else lr)
            close(weight.detach(), slow[i])


@pytest.mark.parametrize("options", FORMS, ids=lambda o: ", ".join(map(str, o.values())))
def test_lars_reads_no_value_on_the_host(options):
    # Meta tensors have none: a step that asks for one, as `if norm > 0` does, raises.
    weights = [nn.Parameter(w.to("meta")) for w in parameters(torch.float)]
    optimizer = LARS(weights, lr=0.1, weight_decay=0.1, **options)
    for _ in range(2):
        for w in weights:
            w.grad = torch.empty_like(w)
        optimizer.step()
    assert len(optimizer.state) == 3


@pytest.mark.parametrize("options", FORMS, ids=lambda o: ", ".join(map(str, o.values())))
def test_lars_resumed_from_its_state_goes_on_as_if_unbroken(options):
    unbroken = parameters()
    whole = LARS(unbroken, lr=0.1, weight_decay=0.1, **options)
    give_gradients(unbroken, 0)
    whole.step()
    resumed = [nn.Parameter(w.detach().clone()) for w in unbroken]
    half = LARS(resumed, lr=9.0, **options)  # rate and decay come from the state
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    for weights, optimizer in ((unbroken, whole), (resumed, half)):
        give_gradients(weights, 1)
        optimizer.step()
    for a, b in zip(unbroken, resumed, strict=True):
        assert torch.equal(a, b)


def test_lars_calls_a_closure_with_gradients_on_and_returns_its_loss():
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss.detach()

    assert optimizer.step(closure) == 4
    assert (w < 1).all()
    assert optimizer.step() is None


def test_lars_leaves_what_has_no_gradient():
    weights = parameters()
    give_gradients(weights[:2], 0)
    before = weights[2].detach().clone()
    optimizer = LARS(weights, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(weights[2], before)
    assert weights[2] not in optimizer.state


def test_an_unknown_form_of_lars_lists_the_known_ones():
    with pytest.raises(UserError, match="no form fast: classic, popular, larc"):
        LARS(parameters(), lr=0.1, form="fast")


def test_parameters_trained_later_are_in_groups_of_their_own_after_the_others():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    for exclude, groups in (("none", [[0, 1], [2, 3]]), ("bias_and_norm", [[0], [1], [2], [3]])):
        found = Optim(exclude=exclude).groups(net.parameters(), later=net[1].parameters(), lr_scale=2.0)
        place = {id(p): i for i, p in enumerate(net.parameters())}
        assert [[place[id(p)] for p in group["params"]] for group in found] == groups
        assert all(group["lr_scale"] == 2.0 for group in found)


def test_each_gradient_is_clipped_on_its_own_and_none_without_a_norm():
    long, short, without = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    for norm, first in ((2.0, 1.0), (0.0, 3.0)):
        long.grad, short.grad = torch.full((4,), 3.0), torch.full((4,), 0.5)  # of length 6 and 1
        clip_each([long, short, without], norm)
        torch.testing.assert_close(long.grad, torch.full((4,), first), rtol=1e-6, atol=0)
        assert torch.equal(short.grad, torch.full((4,), 0.5))
    assert without.grad is None
