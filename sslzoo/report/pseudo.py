"""Pictures of what a teacher is sure of."""

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


def confidence_histogram(path: str | Path, counts: np.ndarray, threshold: float) -> Path:
    """``scores.png``: how many pixels have which probability of their class, and where they are cut.

    Args:
        counts: of pixels in bins of equal width from 0 to 1.
        threshold: those of this probability or more are kept.
    """
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    edges = np.linspace(0, 1, len(counts) + 1)
    axes.stairs(counts, edges, fill=True, color=BLUE)
    axes.axvline(threshold, color=INK, linestyle="--", linewidth=1)
    kept = counts[edges[:-1] >= threshold - 1e-9].sum() / max(counts.sum(), 1)
    axes.set(title=f"about {kept:.1%} of the pixels from probability {threshold:.3g}", xlabel="probability",
             ylabel="pixels", yscale="log")  # fmt: skip
    axes.title.set_size(9)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)
