"""Parts of a labelled set that keep its classes in proportion."""

import numpy as np

from sslzoo.errors import UserError


def balanced(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Rows of a random part that holds ``fraction`` of every class; a smaller part lies inside a larger one.

    Args:
        labels: ``(N,)`` int64; rows of label -1 are left out.
        fraction: 0 to 1, of each class, rounded to whole images.
        seed: of the order in which a class is taken.

    Returns:
        Rows, ascending int64.

    Raises:
        UserError: if ``fraction`` is none, or a class would be left without an image.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.label_fraction={fraction} is no fraction; give more than 0 and at most 1")
    taken = []
    for label in np.unique(labels[labels >= 0]).tolist():
        rows = np.flatnonzero(labels == label)
        count = int(fraction * len(rows) + 0.5)
        if count == 0:
            raise UserError(
                f"data.label_fraction={fraction} leaves class {label} with its {len(rows)} images empty;"
                f" set it to at least {1 / len(rows):.2g}"
            )
        taken.append(np.random.default_rng([seed, label]).permutation(rows)[:count])
    return np.sort(np.concatenate(taken)) if taken else np.arange(0)
