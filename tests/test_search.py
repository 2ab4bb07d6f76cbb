"""Exact nearest neighbours, against brute force in float64."""

import numpy as np
import pytest
import torch

from sslzoo.downstream import search
from sslzoo.downstream.search import neighbours
from sslzoo.errors import UserError

HALF = pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "faiss"])


def unit(z: np.ndarray) -> np.ndarray:
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, d)))


def brute(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    similarity = queries.astype(np.float64) @ bank.astype(np.float64).T
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, 1), rows


def random(rng):
    return unit(rng.standard_normal((3000, 64))), unit(rng.standard_normal((70, 64)))


def clustered(rng):
    centres = rng.standard_normal((10, 64))
    bank, queries = (centres[rng.integers(0, 10, n)] + 0.02 * rng.standard_normal((n, 64)) for n in (3000, 70))
    return unit(bank), unit(queries)


def almost_one_direction(rng):
    """What random networks give: cosines above 0.999."""
    centre = rng.standard_normal(64)
    return unit(centre + 0.02 * rng.standard_normal((3000, 64))), unit(centre + 0.02 * rng.standard_normal((70, 64)))


def almost_equal(rng):
    """Steps below what bfloat16 tells apart, and at the edge of what float32 does."""
    one = unit(rng.standard_normal((1, 64)))
    bank = np.repeat(one, 3000, 0)
    bank[:, 0] += np.float32(2e-7) * rng.permutation(3000).astype(np.float32)
    return bank, unit(rng.standard_normal((70, 64)))


def few_directions(rng):
    """One-hot rows, in which every similarity has hundreds of equals, and a rounding error of none."""
    return np.eye(64, dtype=np.float32)[rng.integers(0, 64, 3000)], np.eye(64, dtype=np.float32)[
        rng.integers(0, 64, 70)
    ]


def with_an_outlier(rng):
    bank, queries = almost_one_direction(rng)
    bank[1234] = -bank[1234]
    return bank, queries


def empty(rng):
    return np.zeros((300, 64), np.float32), unit(rng.standard_normal((7, 64)))


SETS = (random, clustered, almost_one_direction, almost_equal, few_directions, with_an_outlier, empty)


@HALF
@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("k", [1, 20, 200])
def test_neighbours_are_those_of_brute_force_in_float64(make, k, half):
    bank, queries = make(np.random.default_rng(0))
    similarity, rows = neighbours(bank, queries, k, half)
    exact, expected = brute(bank, queries, k)
    found = np.einsum("md,mkd->mk", queries.astype(np.float64), bank[rows].astype(np.float64))
    close = 1e-14 if half else 5e-7  # rows may change places only where that close; faiss computes in float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=close)
    np.testing.assert_allclose(similarity, exact, rtol=0, atol=1e-7 if half else 5e-7)
    assert all(len(set(of_query)) == k for of_query in rows.tolist())
    apart = np.diff(brute(bank, queries, k + 1)[0], axis=1) < -(1e-12 if half else 1e-6)
    alone = apart & np.hstack([np.ones((len(queries), 1), bool), apart[:, :-1]])
    assert np.array_equal(rows[alone], expected[alone])


@HALF
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 5), (50, 7), (50, 50), (300, 200), (900, 899)])
def test_few_rows_and_many_neighbours(n, k, half):
    bank, queries = unit_rows(n, 8), unit_rows(9, 8, seed=1)
    similarity, rows = neighbours(bank, queries, k, half)
    exact, expected = brute(bank, queries, k)
    assert np.array_equal(rows, expected)
    np.testing.assert_allclose(similarity, exact, atol=1e-7)


def test_of_equal_rows_the_first_ones_come_first():
    bank = np.tile(unit_rows(40, 16), (30, 1))  # each 30 times, 40 apart
    rows = neighbours(bank, unit_rows(11, 16, seed=1), 50, True)[1]
    for of_query in rows % 40, rows:
        assert of_query.shape == (11, 50)
    assert (rows[:, :30] % 40 == rows[:, :1] % 40).all()
    assert np.array_equal(rows[:, :30], np.sort(rows[:, :1] % 40) + 40 * np.arange(30))
    assert np.array_equal(rows[:, 30:], rows[:, 30:31] % 40 + 40 * np.arange(20))


def test_the_bound_on_the_error_holds_and_is_needed(monkeypatch):
    """Without the bound the product's own order decides, and bfloat16 gets it wrong."""
    bank, queries = clustered(np.random.default_rng(0))
    expected = brute(bank, queries, 20)[1]
    assert np.array_equal(neighbours(bank, queries, 20, True)[1], expected)
    decide = search._decide

    def careless(scores, errors, *rest):
        decide(scores, 0 * errors, *rest[:-1], 0.0)

    monkeypatch.setattr(search, "_decide", careless)
    assert (neighbours(bank, queries, 20, True)[1] != expected).any()


@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
def test_no_product_is_further_off_than_the_bound_says(make, monkeypatch):
    bank, queries = make(np.random.default_rng(1))
    centre = torch.from_numpy(bank).mean(0).numpy().astype(np.float64)
    exact = queries.astype(np.float64) @ (bank.astype(np.float64) - centre).T
    decide, ratios = search._decide, []

    def watched(scores, errors, floor, of_queries, similarity, rows, known, size, k, rounding):
        bound = np.repeat(errors, size, axis=1)[:, : len(known)] + rounding * np.abs(scores)
        first = next(i for i in range(len(queries)) if np.array_equal(queries[i], of_queries[0]))
        ratios.append((np.abs(scores - exact[first : first + len(scores)]) / bound).max())
        decide(scores, errors, floor, of_queries, similarity, rows, known, size, k, rounding)

    monkeypatch.setattr(search, "_decide", watched)
    neighbours(bank, queries, 10, True)
    assert ratios
    assert max(ratios) <= 1


def test_any_layout_and_precision_is_taken():
    bank, queries = unit_rows(20, 4), unit_rows(5, 4, seed=1)
    expected = neighbours(bank, queries, 3)[1]
    assert np.array_equal(neighbours(np.asfortranarray(bank), queries[::-1][::-1].astype(np.float64), 3)[1], expected)


@HALF
@pytest.mark.parametrize("sides", [(4, 7, 3), (3, 50, 1), (100, 13, 64)])
def test_blocks_parts_and_threads_change_nothing(monkeypatch, sides, half):
    bank, queries = np.tile(unit_rows(50, 8), (2, 1)), unit_rows(9, 8, seed=1)
    similarity, rows = neighbours(bank, queries, 12, half)
    for name, side in zip(("QUERIES", "BANK", "GROUP"), sides, strict=True):
        monkeypatch.setattr(search, name, side)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for again in (bank, iter([bank[:20], bank[20:21], bank[21:]])):
        found = neighbours(again, queries, 12, half)
        assert np.array_equal(found[1], rows)
        np.testing.assert_allclose(found[0], similarity, rtol=0, atol=0 if half else 5e-7)


@HALF
@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
def test_what_earlier_parts_have_found_hides_nothing_in_later_ones(make, half):
    bank, queries = make(np.random.default_rng(2))
    whole = neighbours(bank, queries, 30, half)
    in_parts = neighbours((bank[i : i + 100] for i in range(0, len(bank), 100)), queries, 30, half)
    np.testing.assert_allclose(in_parts[0], whole[0], rtol=0, atol=1e-7 if half else 5e-7)
    exact = np.einsum("md,mkd->mk", queries.astype(np.float64), bank[in_parts[1]].astype(np.float64))
    np.testing.assert_allclose(exact, brute(bank, queries, 30)[0], rtol=0, atol=1e-14 if half else 5e-7)
    assert all(len(set(of_query)) == 30 for of_query in in_parts[1].tolist())


def test_no_queries_have_no_neighbours():
    similarity, rows = neighbours(unit_rows(10, 4), np.empty((0, 4), np.float32), 3)
    assert similarity.shape == rows.shape == (0, 3)


def test_a_bank_smaller_than_k_is_the_users_error():
    with pytest.raises(UserError, match="k=6 neighbours were asked of a bank of 5 images; set k to at most 5"):
        neighbours(unit_rows(5, 6), unit_rows(8, 6), 6)


@HALF
@pytest.mark.parametrize("side", ["bank", "queries"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_the_users_error(side, value, half):
    rows = {"bank": unit_rows(10, 4), "queries": unit_rows(3, 4)}
    rows[side][1, 2] = value
    with pytest.raises(UserError, match="not finite"):
        neighbours(rows["bank"], rows["queries"], 2, half)
