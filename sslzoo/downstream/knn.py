"""Weighted nearest-neighbour classification (InstDisc, sec. 3.4)."""

import faiss
import numpy as np

from sslzoo.errors import UserError


def neighbours(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact nearest rows of ``bank`` by cosine similarity.

    Args:
        bank: unit rows, ``(N, D)`` float32.
        queries: unit rows, ``(M, D)`` float32.
        k: how many.

    Returns:
        Similarities ``(M, k)``, the largest first, and rows ``(M, k)`` int64.

    Raises:
        UserError: if the bank has fewer than k rows, or features are not finite.
    """
    if k > len(bank):
        raise UserError(f"k={k} neighbours were asked of a bank of {len(bank)} images; set k to at most {len(bank)}")
    if not (np.isfinite(bank).all() and np.isfinite(queries).all()):
        raise UserError("the backbone gives features that are not finite (NaN or inf); it was not trained well")
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(np.ascontiguousarray(bank, dtype=np.float32))
    return index.search(np.ascontiguousarray(queries, dtype=np.float32), k)


def vote(similarity: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Class scores from neighbours: each votes for its label with weight ``exp(similarity / T)``.

    Args:
        similarity: ``(M, k)``.
        labels: of the neighbours, ``(M, k)`` int64.
        classes: C.
        temperature: T.

    Returns:
        ``(M, C)`` float64; divided by the largest weight of a row, which changes no ranking.
    """
    weight = np.exp((similarity - similarity[:, :1]) / temperature)
    cells = np.arange(len(labels))[:, None] * classes + labels
    return np.bincount(cells.ravel(), weight.ravel(), len(labels) * classes).reshape(-1, classes)


def knn_top1(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose weighted vote names their label, 0 to 1."""
    similarity, rows = neighbours(bank, queries, min(k, len(bank)))
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    predicted = vote(similarity, bank_labels[rows], classes, temperature).argmax(1)
    return float((predicted == query_labels).mean())
