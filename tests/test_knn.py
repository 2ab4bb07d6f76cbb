"""The vote of nearest neighbours, against loops."""

import math

import numpy as np
import pytest

from sslzoo.downstream.knn import NOWHERE, knn_top1, ranks


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    z = np.random.default_rng(seed).standard_normal((n, d))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def slow_vote(similarity, labels, classes, temperature):
    scores = [0.0] * classes
    for s, label in zip(similarity, labels, strict=True):
        scores[label] += math.exp((s - similarity[0]) / temperature)
    return scores


def slow_rank(similarity, labels, truth, classes, temperature):
    """Where the truth comes among classes that have a vote, by weight and then by number."""
    scores = slow_vote(similarity, labels, classes, temperature)
    order = sorted((c for c in range(classes) if c in labels), key=lambda c: (-scores[c], c))
    return order.index(truth) if truth in order else NOWHERE


def test_every_rank_of_the_grid_is_that_of_a_loop_over_its_neighbours():
    rng = np.random.default_rng(0)
    similarity = -np.sort(-rng.uniform(-1, 1, (30, 20)).astype(np.float32), axis=1)
    labels, truth = rng.integers(0, 6, (30, 20)), rng.integers(0, 8, 30)
    ks, temperatures = [5, 1, 20, 10], [0.1, 0.03, 1.0]
    found = ranks(similarity, labels, truth, ks, temperatures)
    for i, k in enumerate(ks):
        for j, t in enumerate(temperatures):
            expected = [slow_rank(similarity[m, :k], labels[m, :k].tolist(), truth[m], 8, t) for m in range(30)]
            assert found[i, j].tolist() == expected


def test_of_classes_with_equal_votes_the_lower_comes_first():
    similarity, labels = np.full((3, 4), 0.5, np.float32), np.tile([2, 1, 1, 2], (3, 1))
    assert ranks(similarity, labels, np.array([1, 2, 0]), [4], [0.07])[0, 0].tolist() == [0, 1, NOWHERE]


def test_votes_do_not_overflow_at_a_tiny_temperature():
    similarity, labels = np.array([[1.0, 0.9, -1.0]], np.float32), np.array([[1, 0, 0]])
    assert ranks(similarity, labels, np.array([1]), [3], [1e-4]).item() == 0


def test_temperature_decides_between_the_nearest_and_the_many():
    similarity, labels = np.array([[0.9, 0.6, 0.6, 0.6]]), np.array([[0, 1, 1, 1]])
    assert ranks(similarity, labels, np.array([0]), [4], [0.07, 10.0]).ravel().tolist() == [0, 1]


@pytest.mark.parametrize(("k", "name"), [(10, "top1_weighted_knn"), (1, "top1_1nn")])
def test_accuracy_is_that_of_the_official_code_of_instdisc(oracle, k, name):
    o = oracle("instdisc_weighted_knn")
    bank, queries = (o[f"{side}_features"].numpy() for side in ("train", "test"))
    found = knn_top1(bank, o["train_labels"].numpy(), queries, o["test_labels"].numpy(), k, float(o["temperature"]))
    assert found == o[name].item()


@pytest.mark.parametrize("k", [1, 5, 20])
def test_accuracy_is_the_share_of_queries_whose_loop_of_votes_is_right(k):
    rng = np.random.default_rng(2)
    bank, queries = unit_rows(60, 6), unit_rows(40, 6, seed=3)
    labels, truth = rng.integers(0, 3, 60), rng.integers(0, 3, 40)
    right = 0
    for m in range(40):
        similarity = bank.astype(float) @ queries[m].astype(float)
        order = np.argsort(-similarity)[:k]
        right += int(np.argmax(slow_vote(similarity[order], labels[order], 3, 0.07)) == truth[m])
    assert knn_top1(bank, labels, queries, truth, k, 0.07) == right / 40


def test_a_bank_smaller_than_k_votes_as_a_whole():
    bank, labels = unit_rows(5, 6), np.array([0, 0, 1, 1, 1])
    queries, truth = unit_rows(8, 6, seed=1), np.zeros(8, int)
    assert knn_top1(bank, labels, queries, truth, 200) == knn_top1(bank, labels, queries, truth, 5)


def test_a_query_of_a_class_that_the_bank_lacks_counts_as_wrong():
    bank, labels = unit_rows(10, 4), np.zeros(10, int)
    assert knn_top1(bank, labels, bank, np.array([0] * 6 + [7] * 4), 3) == 0.6
