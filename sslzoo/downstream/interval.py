"""How sure an accuracy is: a bootstrap over the images it was measured on."""

import numpy as np


def interval(correct: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``correct`` (Efron and Tibshirani 1993, sec. 13.3).

    Drawing n images with replacement means drawing how often each distinct value comes up: one multinomial a
    resample, whatever n. It tells the luck of the test images, not that of the training run: for that, repeat seeds.

    Args:
        correct: a score each image, ``(n,)``, e.g. whether it was recognised.
        level: share of such intervals that hold the true mean.
        resamples: how many.
        seed: of the draws.

    Returns:
        Lower and upper end.
    """
    values, counts = np.unique(np.asarray(correct, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    low, high = np.quantile(drawn @ values / counts.sum(), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
