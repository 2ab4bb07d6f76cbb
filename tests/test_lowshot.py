"""Linear SVMs with few labels: the optimum, the scores, the draws, and a run of the task."""

import json

import numpy as np
import pytest
import torch

from sslzoo.__main__ import main, run
from sslzoo.blocks import Encoder
from sslzoo.checkpoints.backbone import save_backbone
from sslzoo.config import composed
from sslzoo.downstream.lowshot import (
    COSTS,
    accuracy,
    average_precision,
    best_costs,
    decide,
    few,
    fit,
    learn,
    lowshot,
    mean_average_precision,
    one_of,
    score,
)
from sslzoo.errors import UserError

FEW_COSTS = (0.01, 1.0)


def blobs(n: int, classes: int = 4, dim: int = 8, spread: float = 0.6, seed: int = 0):
    """Unit features around a direction a class, and their labels ``(n, C)``; every class equally often."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(9).standard_normal((classes, dim))
    labels = np.arange(n) % classes
    z = centers[labels] + spread * rng.standard_normal((n, dim))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32), one_of(labels, classes)


def tags(n: int, seed: int = 0):
    """Features whose signs say which of three things an image has, any number of them; some unknown."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 6))
    labels = (z[:, :3] + 0.3 * rng.standard_normal((n, 3)) > 0).astype(np.int8)
    labels[rng.random((n, 3)) < 0.1] = -1
    return z / np.linalg.norm(z, axis=1, keepdims=True), labels


# ---- the SVM ----


@pytest.mark.parametrize("cost", [0.05, 3.0])
def test_weights_are_where_the_objectives_gradient_vanishes(cost):
    z, labels = blobs(60)
    weights = fit(z.astype(float), labels, [cost] * 4)
    x = np.c_[z.astype(float), np.ones(60)]  # the bias is a weight like others
    for w, y in zip(weights, labels.T, strict=True):
        sign, weight = 2.0 * y - 1, np.where(y == 1, 2.0, 1.0)  # positives count twice
        slack = np.maximum(0, 1 - sign * (x @ w))
        gradient = w - 2 * cost * ((weight * slack * sign) @ x)
        assert np.abs(gradient).max() < 2e-2 * max(1, np.abs(w).max())


def test_images_left_out_of_a_class_do_not_move_its_svm():
    z, labels = tags(60)
    moved = z.copy()
    moved[labels[:, 1] == -1] *= -5
    before, after = fit(z, labels, [1.0] * 3), fit(moved, labels, [1.0] * 3)
    np.testing.assert_array_equal(before[1], after[1])
    assert not np.array_equal(before[0], after[0])


def test_decisions_are_inner_products_with_a_bias():
    weights = np.array([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    np.testing.assert_allclose(decide(weights, np.array([[10.0, 1.0]])), [[15.0, -0.5]])


# ---- scores ----


def slow_ap(scores, labels):
    """Precision at the rank of each hit, raised to the best at any later rank."""
    order = sorted((i for i in range(len(labels)) if labels[i] >= 0), key=lambda i: -scores[i])
    precisions, hits = [], 0
    for rank, i in enumerate(order, 1):
        hits += labels[i] == 1
        precisions.append((hits / rank, labels[i] == 1))
    return np.mean([max(p for p, _ in precisions[j:]) for j, (_, hit) in enumerate(precisions) if hit])


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.standard_normal(40), rng.integers(-1, 2, 40)
    assert average_precision(scores, labels) == pytest.approx(slow_ap(scores, labels))


def test_a_perfect_order_has_average_precision_one_and_unknown_labels_do_not_count():
    scores, labels = np.array([4.0, 3.0, 2.0, 1.0]), np.array([1, -1, 1, 0])
    assert average_precision(scores, labels) == 1
    assert average_precision(-scores, labels) == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_the_mean_leaves_out_classes_that_no_image_has():
    scores, labels = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]]), np.array([[1, 0], [0, 0], [0, -1]])
    assert mean_average_precision(scores, labels) == 1
    assert score(scores, labels, single=False) == 1


def test_accuracy_is_the_share_of_highest_scores_that_are_right():
    scores = np.array([[3.0, 1.0], [2.0, 2.5], [1.0, 3.0]])
    assert accuracy(scores, one_of(np.array([0, 0, 1]), 2)) == pytest.approx(2 / 3)


# ---- draws ----


def test_k_images_of_each_class_are_drawn_and_serve_as_the_others_negatives():
    _, labels = blobs(40)
    kept = few(labels, 3, np.random.default_rng(0), single=True)
    asked = (kept >= 0).any(1)
    assert kept[asked].sum(0).tolist() == [3] * 4
    assert asked.sum() == 12
    np.testing.assert_array_equal(kept[asked], labels[asked])


def test_of_images_with_several_classes_each_class_draws_k_with_and_in_proportion_without():
    _, labels = tags(80)
    kept = few(labels, 4, np.random.default_rng(0), single=False)
    assert (kept == 1).sum(0).tolist() == [4] * 3
    assert (kept == 0).sum(0).tolist() == [8] * 3
    assert ((kept == labels) | (kept == -1)).all()


def test_draws_differ_and_the_seed_alone_decides():
    train, val = blobs(80), blobs(40, seed=1)
    one = lowshot(train, val, [1, 2], 3, [0.5], seed=0)
    assert one == lowshot(train, val, [1, 2], 3, [0.5], seed=0)
    assert one != lowshot(train, val, [1, 2], 3, [0.5], seed=1)
    assert one[1]["sd"] > 0
    assert lowshot(train, val, [2], 1, [0.5])[2]["sd"] is None


# ---- costs ----


def test_the_cost_that_cross_validates_best_is_chosen_among_equals_the_smallest():
    z, labels = blobs(48, spread=0.1)  # any cost separates these
    assert best_costs(z, labels, (10.0, 1.0), 3, single=True).tolist() == [1.0] * 4
    z, labels = tags(90)
    chosen = best_costs(z, labels, (1e-6, 1.0), 3, single=False)
    found = []
    for cost in (1e-6, 1.0):  # of the first class, by hand: contiguous parts of each kind
        asked = labels[:, 0] >= 0
        x, y = z[asked], labels[asked, :1]
        part = np.empty(len(y), int)
        for kind in (0, 1):
            rows = np.flatnonzero(y[:, 0] == kind)
            part[rows] = np.arange(len(rows)) * 3 // len(rows)
        scores = []
        for fold in range(3):
            w = fit(x[part != fold], y[part != fold], [cost])
            scores.append(slow_ap(decide(w, x[part == fold])[:, 0], y[part == fold, 0]))
        found.append(np.mean(scores))
    assert abs(found[0] - found[1]) > 1e-3
    assert chosen[0] == (1e-6, 1.0)[int(np.argmax(found))]


def test_costs_of_the_paper_are_those_of_the_configuration():
    assert sorted(composed(["task=lowshot"]).task.costs) == sorted(COSTS)


def test_too_few_images_to_choose_among_costs_are_the_users_error():
    z, labels = blobs(8)
    with pytest.raises(UserError, match=r"smallest class has 2 training images.*set task.costs=\[0.5\]"):
        learn(z, labels)
    assert learn(z, labels, [0.5])[1].tolist() == [0.5] * 4


# ---- the protocol ----


def test_more_images_a_class_are_better_and_more_than_there_are_is_left_out():
    train, val = blobs(160), blobs(200, seed=1)
    table = lowshot(train, val, [1, 4, 32, 64], 5, FEW_COSTS)
    assert list(table) == [1, 4, 32]
    assert table[1]["mean"] < table[4]["mean"] < table[32]["mean"]
    full, _ = learn(*train, FEW_COSTS)
    assert score(decide(full, val[0]), val[1], single=True) > 0.85


def test_images_with_several_classes_are_scored_by_mean_average_precision():
    train, val = tags(120), tags(100, seed=1)
    weights, costs = learn(*train, FEW_COSTS, single=False)
    assert costs.shape == (3,)
    full = score(decide(weights, val[0]), val[1], single=False)
    table = lowshot(train, val, [2, 16], 3, FEW_COSTS, single=False)
    assert 0.5 < table[2]["mean"] < table[16]["mean"] <= full + 0.03
    assert full > 0.9


# ---- a run ----

SMALL = [
    "task=lowshot",
    "data.train_size=80",
    "data.val_size=40",
    "data.workers=1",
    "trainer.accelerator=cpu",
    "task.shots=[1,4,96]",
    "task.samples=2",
    "task.costs=[0.1,1]",
]
SEEN = {"method": "moco", "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 16, "config_hash": "0" * 12}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    return save_backbone(Encoder("resnet10t", stem="small", width=0.125), path, **SEEN)


def complaint(capsys, *arguments):
    """The one line a mistake is told in."""
    assert main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_run_reports_every_k_and_says_which_it_left_out(backbone, tmp_path, capsys):
    summary = run([*SMALL, f"backbone={backbone}", f"run_dir={tmp_path / 'run'}"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["task"], summary["method"], summary["data"]) == ("lowshot", "moco", "photos")
    assert list(summary["lowshot"]) == ["1", "4"]
    assert all(0 <= found["mean"] <= 1 and found["sd"] >= 0 for found in summary["lowshot"].values())
    assert summary["lowshot_left_out"] == [96]
    low, high = summary["lowshot_top1_interval"]
    assert low <= summary["lowshot_top1"] <= high
    told = capsys.readouterr().err
    assert "left out: 96 images a class, for the smallest class has 8" in told
    assert f"{100 * summary['lowshot_top1']:.1f} %" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("task.shots=[0]", "task.shots=[0] are no numbers of images"),
        ("task.shots=[64,96]", "task.shots=[64, 96] are all more than the 8 images of the smallest class"),
        ("task.samples=0", "task.samples=0 draws nothing"),
        ("task.costs=[-1]", "task.costs=[-1] are no costs"),
    ],
)
def test_settings_that_do_not_work_are_refused(capsys, backbone, tmp_path, override, told):
    arguments = [*SMALL, f"backbone={backbone}", f"run_dir={tmp_path / 'run'}", override]
    assert told in complaint(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_images_without_labels_or_without_a_backbone_are_refused(capsys, backbone, tmp_path):
    np.savez(
        tmp_path / "one.npz",
        **{f"{split}_images": np.zeros((4, 16, 16, 3), np.uint8) for split in ("train", "val")},
        **{f"{split}_labels": np.zeros(4, int) for split in ("train", "val")},
    )
    data = ["task=lowshot", "data=npz", f"data.root={tmp_path / 'one.npz'}"]
    assert "task=lowshot needs two classes or more" in complaint(capsys, *data, f"backbone={backbone}")
    assert "task=lowshot needs backbone=" in complaint(capsys, *data)
