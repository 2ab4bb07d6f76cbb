"""Exact nearest neighbours by cosine similarity, faster than a product of matrices in single precision.

A product in bfloat16 tells every similarity up to a known error. Few rows of the bank can be among the k nearest within
that error; their similarities are computed in float64, and these decide. So the result is that of a search in float64,
and does not depend on blocks, parts or threads. Where the hardware does not compute in bfloat16, faiss searches.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import faiss
import numpy as np
import torch
from numba import njit
from torch import Tensor

from sslzoo.errors import UserError

QUERIES, BANK = 256, 65536  # sides of the block of similarities that is made at a time, 96 MB
GROUP = 32  # rows of the bank that are looked at together
NOT_FINITE = "the backbone gives features that are not finite (NaN or inf); it was not trained well"
ROUNDING = 2.0**-8  # of a bfloat16 product when it is written: one unit in the last place, twice what rounding makes


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies matrices in bfloat16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Rounded(NamedTuple):
    """Rows as the product takes them, and how far that is from what they are.

    Attributes:
        z: ``(n, D)`` bfloat16.
        norm: of each row before it was rounded, ``(n,)`` float32.
        lost: norm of what rounding took away, ``(n,)`` float32.
    """

    z: Tensor
    norm: Tensor
    lost: Tensor


def neighbours(
    bank: np.ndarray | Iterable[np.ndarray], queries: np.ndarray, k: int, half: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest rows of ``bank`` by cosine similarity.

    By products in bfloat16 they are those of float64, and of equal ones the first in the bank. By faiss they are those
    of float32: rows as similar as its rounding may change places.

    Args:
        bank: unit rows, ``(N, D)``, or parts of them one after the other, where they do not fit into memory.
        queries: unit rows, ``(M, D)``.
        k: how many.
        half: multiply in bfloat16 instead of asking faiss; by default where the CPU is fast at it.

    Returns:
        Similarities ``(M, k)`` float32, the largest first, and rows ``(M, k)`` int64.

    Raises:
        UserError: if the bank has fewer than k rows, or features are not finite.
    """
    half = bfloat16_is_fast() if half is None else half
    queries = _single(queries)
    asked = rounded(queries, torch.zeros(queries.shape[1]))
    similarity, rows, size = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64), 0
    for part in [bank] if isinstance(bank, np.ndarray) else bank:
        for start in range(0, len(part), BANK):
            known = _single(part[start : start + BANK])
            least = similarity[:, -1] if size >= k else np.full(len(queries), -np.inf)
            wanted = min(k, len(known))
            found, of_part = (
                _nearest(known, queries, asked, wanted, least) if half else _by_faiss(known, queries, wanted)
            )
            similarity, rows = np.hstack([similarity, found]), np.hstack([rows, of_part + size])
            if size:
                order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
                similarity, rows = (np.take_along_axis(each, order, 1) for each in (similarity, rows))
            size += len(known)
    if k > size:
        raise UserError(f"k={k} neighbours were asked of a bank of {size} images; set k to at most {size}")
    return similarity.astype(np.float32), rows


def _single(rows: np.ndarray) -> np.ndarray:
    return np.require(rows, np.float32, ["C", "W"])


def rounded(rows: np.ndarray, centre: Tensor) -> Rounded:
    """``rows`` (n, D) less ``centre`` (D,), for the product; 2,048 at a time, while they are in the cache.

    Raises:
        UserError: if a row is not finite.
    """
    z = torch.empty(rows.shape, dtype=torch.bfloat16)
    norm, lost = torch.empty(len(rows)), torch.empty(len(rows))
    for start in range(0, len(rows), 2048):
        part = slice(start, start + 2048)
        centred = torch.from_numpy(rows[part]) - centre
        norm[part] = centred.norm(dim=1)
        lost[part] = centred.sub_(z[part].copy_(centred)).norm(dim=1)
    if not norm.isfinite().all():
        raise UserError(NOT_FINITE)
    return Rounded(z, norm, lost)


def _by_faiss(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities ``(M, k)`` and rows in one part of the bank; of those that are equally similar the first first."""
    if not np.isfinite(bank).all():
        raise UserError(NOT_FINITE)
    similarity, rows = faiss.knn(queries, bank, k, metric=faiss.METRIC_INNER_PRODUCT)
    order = np.lexsort((rows, -similarity))
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1)


def _nearest(
    bank: np.ndarray, queries: np.ndarray, asked: Rounded, k: int, least: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows in one part of the bank, (N, D); similarities ``(M, k)`` are float64.

    Rows less similar than ``least`` (M,) are not looked for; where fewer than k remain, similarities are -inf.

    The bank's mean is taken off its rows: it adds the same to all similarities of a query, so their order stays, and
    rounding what is left loses less. With ~ for rounded, c for centred, ``q.c - q~.c~ = (q - q~).c + q~.(c - c~)``, and
    so a product is wrong by at most ``|q - q~| |c| + |q~| |c - c~|``, what sums in float32 lose, and its own rounding.
    """
    n, dim = bank.shape
    centre = torch.from_numpy(bank).mean(0)
    known = rounded(bank, centre)
    floor = least - (torch.from_numpy(queries).double() @ centre.double()).numpy() - 1e-12 * asked.norm.numpy()
    sums = 2 * dim * 2.0**-24  # n u (Higham 2002, sec. 3.1), twice, for units that round otherwise than to the nearest
    size = max(1, min(GROUP, n // (4 * k)))
    norm, lost = (  # the largest of each group
        np.maximum.reduceat(each.numpy(), np.arange(0, n, size))
        for each in (known.norm, known.lost + sums * known.norm)
    )
    asked_lost, asked_norm = (asked.lost + 2.0**-23 * asked.norm).numpy(), (asked.norm + asked.lost).numpy()
    similarity, rows = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    block, single = torch.empty(QUERIES * n, dtype=known.z.dtype), torch.empty(QUERIES * n)
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(queries), QUERIES):
            x = asked.z[start : start + QUERIES]
            product = torch.mm(x, known.z.T, out=block[: len(x) * n].view(len(x), n))
            scores = single[: len(x) * n].view(len(x), n).copy_(product)
            part = slice(start, start + len(x))
            errors = np.outer(asked_lost[part], norm) + np.outer(asked_norm[part], lost)
            errors = (1.01 * errors + 1e-30).astype(np.float32)  # the norms were rounded as well
            columns = scores.numpy(), errors, floor[part], queries[part], similarity[part], rows[part]
            shares = zip(*(np.array_split(column, workers) for column in columns), strict=True)
            list(pool.map(lambda share: _decide(*share, bank, size, k, ROUNDING), shares))
    return similarity, rows


@njit(nogil=True, cache=True, fastmath={"nnan", "ninf", "nsz", "reassoc", "contract"})
def _highest(values):
    highest = values[0]
    for value in values:
        highest = max(highest, value)
    return highest


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dots(x, bank, rows, found):
    """Products of ``x`` (D,) with ``rows`` of the bank in float64, four at a time, to wait for memory once."""
    last = rows.size - 1
    for i in range(0, rows.size, 4):
        i1, i2, i3 = min(i + 1, last), min(i + 2, last), min(i + 3, last)
        a, b, c, d = bank[rows[i]], bank[rows[i1]], bank[rows[i2]], bank[rows[i3]]
        of_a = of_b = of_c = of_d = 0.0
        for j in range(x.size):
            of_a += x[j] * np.float64(a[j])
            of_b += x[j] * np.float64(b[j])
            of_c += x[j] * np.float64(c[j])
            of_d += x[j] * np.float64(d[j])
        found[i], found[i1], found[i2], found[i3] = of_a, of_b, of_c, of_d


@njit(nogil=True, cache=True)
def _reaching(values, least, first, places):
    """Write where ``values`` are ``least`` or more into ``places``, counted from ``first``; return how many."""
    count = 0
    for j in range(values.size):
        places[count] = first + j
        count += values[j] >= least
    return count


@njit(nogil=True, cache=True)
def _decide(scores, errors, floor, queries, similarity, rows, bank, size, k, rounding):
    """The k best rows of each query by ``scores`` (m, N), float64 deciding wherever their error lets two change places.

    A group's best row is at least as similar as its score less its error. The k-th largest of these is a limit that k
    rows reach, so that a row which does not reach it even with its error added is none of the k nearest.

    Args:
        errors: of the scores of each group of ``size`` rows, ``(m, G)``, to which ``rounding`` times the score adds.
        floor: a limit that is known already, ``(m,)``.
        queries, bank: ``(m, D)`` and ``(N, D)`` float32, as they are.
        similarity, rows: to be filled, ``(m, k)`` each.
    """
    n, groups = scores.shape[1], errors.shape[1]
    peaks, least = np.empty(groups), np.empty(groups)
    candidates, exact = np.empty(n, np.int64), np.empty(n)
    for m in range(len(scores)):
        for g in range(groups):
            peaks[g] = _highest(scores[m, g * size : (g + 1) * size])
            least[g] = peaks[g] - errors[m, g] - rounding * abs(peaks[g])
        limit = max(floor[m], np.partition(least, groups - k)[groups - k])
        count = 0
        for g in range(groups):
            needed = limit - errors[m, g]  # v + r|v| >= x only where v >= x - r|x|, and a little lower for r^2
            needed -= (1.01 * rounding + 1e-6) * abs(needed)
            if peaks[g] >= needed:
                first = g * size
                count += _reaching(scores[m, first : first + size], np.float32(needed), first, candidates[count:])
        _dots(queries[m].astype(np.float64), bank, candidates[:count], exact)
        order = np.argsort(-exact[:count], kind="mergesort")[:k]
        similarity[m], rows[m] = -np.inf, -1
        for i in range(order.size):
            similarity[m, i], rows[m, i] = exact[order[i]], candidates[order[i]]
