"""Pictures of a network that places points: its curves, and points beside the truth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sslzoo.data.points import PointSet
from sslzoo.report.pictures import BLUE, GREEN, INK, ORANGE, draw_shares, save, training_curves


def curves(rows: list[dict], path: str | Path, title: str) -> Path:
    """``curves.png``: loss, normalised mean error and correct keypoints, speed."""
    lines = {"pck": ("PCK", GREEN), "nme": ("NME", BLUE)}
    return training_curves(rows, path, title, lambda axes: draw_shares(axes, rows, lines, "held-out objects, %"))


def predictions(
    path: str | Path, examples: PointSet, found: np.ndarray, title: str, count: int = 24, columns: int = 8
) -> Path:
    """``predictions.png``: some held-out objects with their labelled points, joined to those found.

    Args:
        examples: the set.
        found: ``(N, K, 2)`` in pixels of the pictures; NaN is not drawn.
        count: how many objects, spread over the set.
    """
    chosen = np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int).tolist()
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.5 * lines + 0.6))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(grid, chosen, strict=False):
        left, top, side = examples.squares[i].tolist()
        axes.imshow(examples.picture(i), interpolation="nearest")
        draw_points(axes, examples.points[i], found[i])
        axes.set(xlim=(left - 0.5, left + side - 0.5), ylim=(top + side - 0.5, top - 0.5))
    figure.suptitle(f"{title}\ngreen: annotated; orange: found", fontsize=9, color=INK)
    figure.subplots_adjust(hspace=0.05, wspace=0.05, top=1 - 0.6 / (1.5 * lines + 0.6))
    return save(figure, path)


def draw_points(axes: Axes, points: np.ndarray, found: Sequence[Sequence[float]]) -> None:
    """Labelled points ``(K, 3)`` as rings, those found ``(K, 2)`` as dots, and a line between the two of one name."""
    for (x, y, labelled), (a, b) in zip(np.asarray(points).tolist(), np.asarray(found).tolist(), strict=True):
        if labelled > 0:
            axes.plot([x, a], [y, b], color="white", linewidth=0.8)
            axes.plot(x, y, "o", color=GREEN, markersize=6, fillstyle="none", markeredgewidth=1.3)
        axes.plot(a, b, "o", color=ORANGE, markersize=2.5)
