"""Bootstrap intervals against their definition, and how often they hold what they promise."""

import numpy as np
import pytest

from sslzoo.downstream.interval import interval


def test_interval_is_that_of_means_of_resampled_images():
    scores = np.array([0.0, 0.25, 0.25, 1.0, 1.0, 1.0, 0.5])
    rng = np.random.default_rng(1)
    means = [rng.choice(scores, len(scores)).mean() for _ in range(20_000)]
    assert interval(scores, 0.9, 20_000) == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=0.02)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_so_many_intervals_as_promised_hold_the_true_accuracy(level):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        low, high = interval(rng.random(500) < 0.7, level, 1000)
        held += low <= 0.7 <= high
    assert held / 600 == pytest.approx(level, abs=0.03)


def test_an_interval_is_that_of_the_binomial_for_right_and_wrong():
    low, high = interval(np.arange(2048) < 1310)
    p = 1310 / 2048
    assert (high - low) / 2 == pytest.approx(1.96 * (p * (1 - p) / 2048) ** 0.5, rel=0.03)
    assert low < p < high


def test_it_is_the_same_every_time_and_a_point_where_all_are_right():
    scores = np.random.default_rng(0).random(100)
    assert interval(scores) == interval(scores)
    assert interval(scores) != interval(scores, seed=1)
    assert interval(np.ones(50, bool)) == (1, 1)
    assert interval(np.zeros(50, bool)) == (0, 0)
