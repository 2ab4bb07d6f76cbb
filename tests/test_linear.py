"""Linear classifiers: against scikit-learn, against a plain training loop, and the backbone they leave as it was."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from runs import Flaky, image_set, trainer
from sslzoo.blocks import Encoder
from sslzoo.data.module import Images
from sslzoo.downstream import features as module
from sslzoo.downstream.linear import Heads, HeadSGD, cached, held_out, outcome
from sslzoo.downstream.logistic import Rows, hits, logistic, place
from sslzoo.errors import UserError
from sslzoo.method import Batch
from sslzoo.optim import Optim
from sslzoo.views import Clean, View, Views


def clusters(n: int = 120, d: int = 6, classes: int = 4, seed: int = 0, dtype=np.float64):
    """Overlapping clusters whose dimensions differ in mean and scale."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    z = np.random.default_rng(7).standard_normal((classes, d))[labels] + 0.8 * rng.standard_normal((n, d))
    return (z * np.logspace(-1, 1, d) + np.linspace(-3, 5, d)).astype(dtype), labels


# Logistic regression


@pytest.mark.parametrize("mapped", [False, True])
def test_heads_are_those_of_scikit_learn(tmp_path, monkeypatch, mapped):
    z, labels = clusters()
    if mapped:
        np.save(tmp_path / "z.npy", z)
        z = np.load(tmp_path / "z.npy", mmap_mode="r")
    monkeypatch.setattr(module, "PART", 50 * z.shape[1])  # several parts
    strengths = [1e-3, 1.0, 1e-2]
    heads = logistic(Rows(z, labels), 4, strengths, steps=500)
    standard = (z - z.mean(0)) / z.std(0)
    for strength, head in zip(strengths, heads, strict=True):
        other = LogisticRegression(C=1 / (strength * len(z)), tol=1e-10, max_iter=5000).fit(standard, labels)
        ours = (torch.from_numpy(np.array(z)) @ head.weight + head.bias).softmax(1).numpy()
        np.testing.assert_allclose(ours, other.predict_proba(standard), atol=1e-5)
        np.testing.assert_allclose((head.weight.numpy() * z.std(0)[:, None]).T, other.coef_, atol=1e-4)


def test_single_precision_finds_the_same_accuracy():
    exact, single = (
        logistic(Rows(clusters(dtype=dtype)[0], clusters()[1]), 4, [1e-2]) for dtype in (np.float64, np.float32)
    )
    torch.testing.assert_close(single[0].weight.double(), exact[0].weight, atol=2e-3, rtol=2e-3)


def test_where_it_starts_does_not_change_where_it_ends():
    z, labels = clusters()
    rows, strengths = Rows(z, labels), [1e-2, 1.0]
    first = logistic(Rows(z, labels, np.arange(0, 120, 2)), 4, strengths)
    for a, b in zip(logistic(rows, 4, strengths, steps=300), logistic(rows, 4, strengths, first, 300), strict=True):
        torch.testing.assert_close(a.weight, b.weight, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.bias, b.bias, atol=1e-4, rtol=1e-5)


def test_a_constant_dimension_is_harmless():
    z, labels = clusters()
    z[:, 2] = 4.2
    (head,) = logistic(Rows(z, labels), 4, [1e-2])
    assert head.weight.isfinite().all()
    assert head.weight[2].abs().max() < 1e-9


def test_a_place_is_how_many_classes_come_before():
    scores = torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0], [math.nan, 9.0, 1.0], [5.0, 1.0, 1.0]])
    assert place(scores, torch.tensor([0, 1, 1, 2])).tolist() == [2, 1, 3, 2]
    batched = place(torch.stack([scores, -scores]), torch.tensor([0, 1, 1, 2]))
    assert batched.tolist() == [[2, 1, 3, 2], [0, 1, 3, 1]]


def test_hits_are_predictions_that_are_right():
    z, labels = clusters(classes=8, d=4)
    (head,) = logistic(Rows(z, labels), 8, [1e-1])
    top1, top5 = hits(head, Rows(z, labels))
    scores = z @ head.weight.numpy() + head.bias.numpy()
    assert top1.tolist() == (scores.argmax(1) == labels).tolist()
    assert top5.tolist() == [labels[i] in np.argsort(-scores[i])[:5] for i in range(len(z))]


# The choice


def test_the_part_to_choose_by_has_its_share_of_every_class():
    labels = np.repeat([0, 1, 2], [10, 30, 5])
    rows = held_out(labels, 0.2)
    assert np.bincount(labels[rows]).tolist() == [2, 6, 1]


@pytest.mark.parametrize(
    ("labels", "fraction", "told"),
    [
        ([0, 0, 1, 1], 0.0, r"task\.selection=0\.0 is no part"),
        ([0, 0, 1, 1], 1.0, r"task\.selection=1\.0 is no part"),
        (
            [0] * 20 + [1] * 3,
            0.1,
            r"task\.selection=0\.1 of class 1 with its 3 training images .*set it to about 0\.33",
        ),
        ([0] * 20 + [1], 0.6, r"task\.selection=0\.6 of class 1 with its 1 training images .*add images"),
    ],
)
def test_a_class_without_images_on_one_side_is_named(labels, fraction, told):
    with pytest.raises(UserError, match=told):
        held_out(np.array(labels), fraction)


def test_cached_chooses_on_training_images_and_scores_a_head_of_all_of_them():
    z, labels = clusters(240, dtype=np.float32)
    other, truth = clusters(80, seed=1, dtype=np.float32)
    strengths = [1e-3, 1e-1, 30.0]
    found = cached({"last": z, "last4": z[:, :2]}, labels, {"last": other, "last4": other[:, :2]}, truth, strengths)
    names = [(row["features"], row["lr"]) for row in found.curve]
    assert names == [(kind, strength) for kind in ("last", "last4") for strength in strengths]
    held = held_out(labels, 0.1)
    fit = np.setdiff1d(np.arange(240), held)
    for row, strength in zip(found.curve[:3], strengths, strict=True):
        (part,) = logistic(Rows(z, labels, fit), 4, [strength], steps=300)
        (whole,) = logistic(Rows(z, labels), 4, [strength], steps=300)
        assert row["selection_top1"] == pytest.approx(hits(part, Rows(z, labels, held))[0].mean(), abs=0.05)
        assert row["val_top1"] == pytest.approx(hits(whole, Rows(other, truth))[0].mean(), abs=0.02)
    chances = [row["selection_top1"] for row in found.curve]
    assert found.chosen == int(np.argmax(chances))
    assert found.top1.mean() == found.curve[found.chosen]["val_top1"]
    assert found.top5.all()  # there are four classes


def test_labels_of_the_held_out_images_do_not_change_the_choice():
    z, labels = clusters(240, dtype=np.float32)
    other, truth = clusters(80, seed=1, dtype=np.float32)
    strengths = [1e-3, 1e-1, 30.0]
    found, lied = (cached({"last": z}, labels, {"last": other}, t, strengths) for t in (truth, (truth + 1) % 4))
    assert lied.chosen == found.chosen
    assert lied.top1.mean() != found.top1.mean()


def test_one_strength_needs_no_choice():
    z, labels = clusters(24, dtype=np.float32)
    found = cached({"last": z}, labels, {"last": z}, labels, [1e-2], selection=0.001)
    assert [row["selection_top1"] for row in found.curve] == [None]


def test_a_sweep_in_which_all_diverged_is_one_line():
    never = np.zeros(5, bool)
    with pytest.raises(UserError, match=r"no rate of task\.lrs learnt anything"):
        outcome([("last", 1.0), ("last", 2.0)], [0.0, 0.0], [(never, never)] * 2)


# Heads on crops


class Small(Encoder):
    """A ResNet of 8 pixels and a few channels."""

    def __init__(self):
        super().__init__("resnet10t", stem="small", width=0.125)


def crops():
    return Images(image_set(), None, Views([View(8)]), Clean(8), batch_size=6, workers=1)


def drawn(steps: int, n: int = 24, size: int = 8):
    chance = torch.Generator().manual_seed(1)
    for _ in range(steps):
        index = torch.randperm(n, generator=chance)[:8]
        yield Batch([torch.randn(8, 3, size, size, generator=chance)], index, index % 3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_every_head_and_its_twin_is_a_plain_training_loop(nesterov):
    encoder = Small()
    optim = Optim(lr=1.0, lr_per=None, momentum=0.8, weight_decay=0.01)
    held = np.arange(24) % 4 == 1
    dims, lrs = {"last": encoder.dim, "last4": sum(encoder.widths)}, [0.01, 0.3, 2.0]
    heads = Heads(encoder, dims, 3, lrs, optim, held, nesterov)
    start = {kind: heads.weight[kind].detach()[:, :3].clone() for kind in dims}
    steps = heads.configure_optimizers()
    for i, batch in enumerate(drawn(4)):
        steps.param_groups[0]["lr"] = 1 - 0.2 * i
        steps.zero_grad()
        heads.training_step(batch).backward()
        steps.step()
    for kind in dims:
        weight, bias = heads.weight[kind].view(-1, 2, 3, 3), heads.bias[kind].view(2, 3, 3)
        for twin in (0, 1):
            for r, lr in enumerate(lrs):
                w, b = start[kind].clone().requires_grad_(), torch.zeros(3, requires_grad=True)
                plain = torch.optim.SGD([w, b], lr, momentum=0.8, weight_decay=0.01, nesterov=nesterov)
                for i, batch in enumerate(drawn(4)):
                    x, y = batch.views[0], batch.label
                    if twin:
                        x, y = (each[~torch.from_numpy(held)[batch.index]] for each in (x, y))
                    with torch.no_grad():
                        maps = torch.cat([each.mean((2, 3)) for each in encoder.maps(x)], 1)
                        h = encoder(x) if kind == "last" else maps
                    plain.param_groups[0]["lr"] = lr * (1 - 0.2 * i)
                    plain.zero_grad()
                    cross_entropy(h @ w + b, y).backward()
                    plain.step()
                torch.testing.assert_close(weight[:, twin, r], w.detach(), atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(bias[twin, r], b.detach(), atol=1e-5, rtol=1e-4)


def test_one_rate_in_a_trainer_is_a_plain_training_loop_over_the_same_crops():
    encoder = Small()
    heads = Heads(encoder, {"last": encoder.dim}, 3, [0.5], Optim(lr=1.0, batch_size=6))
    w = heads.weight["last"].detach().clone().requires_grad_()
    b = torch.zeros(3, requires_grad=True)
    trainer(max_epochs=3).fit(heads, datamodule=crops())
    data = crops()
    data.trainer = trainer()
    loader = data.train_dataloader()
    plain = torch.optim.SGD([w, b], 1.0, momentum=0.9)
    for step in range(12):
        plain.param_groups[0]["lr"] = 0.5 * 6 / 256 * (1 + math.cos(math.pi * step / 12)) / 2
        batch = loader.make(step, None)
        with torch.no_grad():
            h = encoder(batch.views[0])
        plain.zero_grad()
        cross_entropy(h @ w + b, batch.label).backward()
        plain.step()
    assert not torch.equal(w[:, 0], w[:, 1])
    torch.testing.assert_close(heads.weight["last"].detach(), w.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(heads.bias["last"].detach(), b.detach(), atol=1e-6, rtol=1e-5)


def test_frozen_means_that_no_bit_of_the_backbone_changes():
    encoder = Small().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    held = np.arange(24) % 4 == 1
    heads = Heads(encoder, {"last": encoder.dim}, 3, [0.1, 100.0], Optim(lr=1.0), held)
    trainer(max_epochs=2).fit(heads, datamodule=crops())
    heads.outcome(image_set(), image_set(12, seed=1), Clean(8))
    assert not any(part.training for part in encoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_head_that_diverged_is_wrong_and_spoils_no_other():
    encoder = Small()
    heads = Heads(encoder, {"last": encoder.dim}, 3, [0.1, 1.0], Optim(lr=1.0))
    alone = Heads(encoder, {"last": encoder.dim}, 3, [0.1], Optim(lr=1.0))
    with torch.no_grad():
        heads.weight["last"][:, 3:] = math.inf
    for each in (heads, alone):
        steps = each.configure_optimizers()
        for batch in drawn(2):
            steps.zero_grad()
            each.training_step(batch).backward()
            steps.step()
    torch.testing.assert_close(heads.weight["last"][:, :3], alone.weight["last"])
    places = heads.places(image_set(12), Clean(8))["last"]
    assert (places[0, 1] == 3).all()
    assert (places[0, 0] < 3).all()


def test_the_curve_is_of_the_twins_on_what_they_did_not_see_and_of_the_others_on_what_nobody_saw():
    encoder = Small()
    held = np.arange(24) % 4 == 1
    heads = Heads(encoder, {"last": encoder.dim}, 3, [0.1, 1.0], Optim(lr=1.0), held)
    heads.weight["last"].data.normal_()
    train, val = image_set(), image_set(12, seed=1)
    found = heads.outcome(train, val, Clean(8))
    for r, row in enumerate(found.curve):
        for twin, data, rows, key in ((1, train, np.flatnonzero(held), "selection_top1"), (0, val, None, "val_top1")):
            places = heads.places(data, Clean(8), rows)["last"][twin, r]
            assert row[key] == (places == 0).mean()
    assert found.curve[found.chosen]["selection_top1"] == max(row["selection_top1"] for row in found.curve)


def test_images_that_cannot_be_read_are_left_out_of_the_score():
    encoder = Small()
    heads = Heads(encoder, {"last": encoder.dim}, 3, [0.1], Optim(lr=1.0))
    places = heads.places(Flaky(image_set(), broken=[2, 9]), Clean(8), on_error="skip")
    assert places["last"].shape == (1, 1, 22)


def test_momentum_of_heads_survives_a_checkpoint():
    w = torch.nn.Parameter(torch.ones(2, 3))
    steps = HeadSGD([w], torch.tensor([1.0, 2.0, 3.0]))
    w.grad = torch.ones(2, 3)
    steps.step()
    again = HeadSGD([w], torch.tensor([1.0, 2.0, 3.0]))
    again.load_state_dict(steps.state_dict())
    again.step()
    assert w[0].tolist() == pytest.approx([1 - 2.9, 1 - 5.8, 1 - 8.7])
