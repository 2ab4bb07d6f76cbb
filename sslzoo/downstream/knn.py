"""Weighted nearest-neighbour classification (InstDisc, sec. 3.4)."""

from collections.abc import Sequence

import numpy as np
from numba import njit

from sslzoo.downstream.search import neighbours


def ranks(
    similarity: np.ndarray, labels: np.ndarray, truth: np.ndarray, ks: Sequence[int], temperatures: Sequence[float]
) -> np.ndarray:
    """Where the true class comes in the vote of the first k neighbours, for every k and temperature.

    Each neighbour votes for its label with weight ``exp(similarity / T)``; of equal classes the lower label comes
    first, and a class without a vote comes nowhere.

    Args:
        similarity: of the neighbours, ``(M, K)``, the largest first.
        labels: of the neighbours, ``(M, K)`` int64.
        truth: ``(M,)`` int64.
        ks: up to K each.
        temperatures: T.

    Returns:
        ``(len(ks), len(temperatures), M)`` int64: 0 where the vote is right; ``NOWHERE`` without a vote.
    """
    order = np.argsort(ks)
    classes = int(max(labels.max(), truth.max())) + 1
    found = np.empty((len(ks), len(temperatures), len(truth)), np.int64)
    found[order] = _ranks(
        np.ascontiguousarray(similarity, np.float32),  # of one kind, so that it is compiled once
        np.ascontiguousarray(labels, np.int64),
        np.ascontiguousarray(truth, np.int64),
        np.asarray(ks, np.int64)[order],
        np.asarray(temperatures, np.float64),
        classes,
    )
    return found


NOWHERE = np.iinfo(np.int64).max


@njit(nogil=True, cache=True)
def _ranks(similarity, labels, truth, ks, temperatures, classes):
    found = np.empty((ks.size, temperatures.size, truth.size), np.int64)
    votes = np.zeros(classes)
    voted = np.empty(ks[-1], np.int64)  # the classes that have a vote, each once
    for m in range(truth.size):
        for t in range(temperatures.size):
            start, count = 0, 0
            for i in range(ks.size):  # the smaller k's neighbours vote for the larger k as well
                for j in range(start, ks[i]):
                    weight = np.exp((similarity[m, j] - similarity[m, 0]) / temperatures[t])
                    if votes[labels[m, j]] == 0.0:
                        voted[count] = labels[m, j]
                        count += 1
                    votes[labels[m, j]] += weight
                start = ks[i]
                own, before = votes[truth[m]], 0
                for c in voted[:count]:
                    before += votes[c] > own or (votes[c] == own and c < truth[m])
                found[i, t, m] = before if own > 0.0 else NOWHERE
            votes[voted[:count]] = 0.0
    return found


def knn_top1(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose weighted vote names their label, 0 to 1; a bank smaller than k votes as a whole."""
    k = min(k, len(bank))
    similarity, rows = neighbours(bank, queries, k)
    return float((ranks(similarity, bank_labels[rows], query_labels, [k], [temperature]) == 0).mean())
