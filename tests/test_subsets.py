"""Parts of a labelled set."""

from itertools import pairwise

import numpy as np
import pytest

from sslzoo.data.subsets import balanced
from sslzoo.errors import UserError

LABELS = np.repeat([2, 0, 1, -1], [100, 40, 10, 50])


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 1.0])
def test_every_class_keeps_its_share_and_unlabelled_rows_stay_out(fraction):
    counts = np.bincount(LABELS[balanced(LABELS, fraction)], minlength=3)
    assert counts.tolist() == [int(n * fraction + 0.5) for n in (40, 10, 100)]


def test_a_smaller_part_lies_inside_a_larger_one():
    parts = [set(balanced(LABELS, fraction, seed=3)) for fraction in (0.05, 0.2, 0.5, 1.0)]
    assert all(small < large for small, large in pairwise(parts))


def test_the_seed_alone_decides_and_rows_are_unique():
    part = balanced(LABELS, 0.3, seed=1)
    assert np.array_equal(part, balanced(LABELS, 0.3, seed=1))
    assert not np.array_equal(part, balanced(LABELS, 0.3, seed=2))
    assert len(np.unique(part)) == len(part)


@pytest.mark.parametrize(("fraction", "told"), [(0, "fraction"), (1.5, "fraction"), (0.04, "class 1 .* at least 0.1")])
def test_a_part_that_is_none_or_empties_a_class_is_refused(fraction, told):
    with pytest.raises(UserError, match=told):
        balanced(LABELS, fraction)
