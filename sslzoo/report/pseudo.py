"""Picture of what a teacher is sure of."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sslzoo.report.pictures import BLUE, INK, save


def score_histogram(path: str | Path, scores: np.ndarray, threshold: float, density: float, labelled: float) -> Path:
    """``scores.png``: how many boxes have which score, and where they are cut.

    Args:
        scores: of all boxes that were found, ``(n,)``.
        threshold: those of this score or more are kept.
        density: boxes an image that are kept.
        labelled: boxes an image in the labelled set.
    """
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.hist(scores, bins=40, range=(0, 1), color=BLUE)
    axes.axvline(threshold, color=INK, linestyle="--", linewidth=1)
    axes.set(title=f"{density:.2f} boxes an image from score {threshold:.3g}; labelled: {labelled:.2f}",
             xlabel="score", ylabel="boxes", yscale="log" if len(scores) else "linear")  # fmt: skip
    axes.title.set_size(9)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)
