"""Pictures of one run: its curves, and the nearest neighbours before and after."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sslzoo.checkpoints.files import write_whole
from sslzoo.data.images import ImageSet
from sslzoo.downstream.search import neighbours

matplotlib.use("Agg")

INK, BLUE, ORANGE, GREEN, RED = "#333333", "#2a6fb0", "#d9822b", "#3a9a4f", "#c23b3b"


def save(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` as PNG, whole."""
    return write_whole(path, lambda partial: figure.savefig(partial, dpi=120, bbox_inches="tight"))


def draw_loss(axes: Axes, rows: list[dict]) -> None:
    """Training loss over steps."""
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    axes.plot(*zip(*steps, strict=True), color=BLUE, linewidth=1.2) if steps else None
    axes.set(title="loss", xlabel="optimizer step")


def draw_knn(axes: Axes, rows: list[dict], raw: float | None, random_init: float | None) -> None:
    """kNN accuracy over steps, and the two baselines."""
    steps = [(row["step"], 100 * row["knn_top1"]) for row in rows if "knn_top1" in row]
    if steps:
        axes.plot(*zip(*steps, strict=True), color=BLUE, marker="o", markersize=3, label="pretrained")
    for value, name, colour in ((random_init, "random init", ORANGE), (raw, "raw pixels", INK)):
        if value is not None:
            axes.axhline(100 * value, color=colour, linestyle="--", linewidth=1, label=name)
    axes.set(title="kNN top-1, %", xlabel="optimizer step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def draw_speed(axes: Axes, rows: list[dict]) -> None:
    """Images per second over steps."""
    steps = [(row["step"], row["images_per_second"]) for row in rows if "images_per_second" in row]
    axes.plot(*zip(*steps, strict=True), color=GREEN, linewidth=1) if steps else None
    axes.set(title="images / s", xlabel="optimizer step")
    axes.set_ylim(bottom=0)


def draw_shares(axes: Axes, rows: list[dict], lines: dict[str, tuple[str, str]], title: str) -> None:
    """Scores as shares of 1 over steps, in percent; ``lines`` is score -> its name and colour."""
    for key, (name, colour) in lines.items():
        steps = [(row["step"], 100 * row[key]) for row in rows if key in row]
        if steps:
            axes.plot(*zip(*steps, strict=True), color=colour, marker="o", markersize=3, label=name)
    axes.set(title=title, xlabel="optimizer step")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def training_curves(rows: list[dict], path: str | Path, title: str, draw_score: Callable[[Axes], None]) -> Path:
    """Three panels: the loss, what ``draw_score`` draws, the speed."""
    figure = Figure(figsize=(11, 3))
    axes = figure.subplots(1, 3)
    draw_loss(axes[0], rows)
    draw_score(axes[1])
    draw_speed(axes[2], rows)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return save(figure, path)


def curves(rows: list[dict], path: str | Path, title: str, raw: float | None, random_init: float | None) -> Path:
    """``curves.png``: loss, kNN accuracy with its baselines, speed."""
    return training_curves(rows, path, title, lambda axes: draw_knn(axes, rows, raw, random_init))


def draw_neighbours(
    axes: Sequence[Axes],
    title: str,
    similar: np.ndarray,
    queries: tuple[ImageSet, np.ndarray],
    bank: tuple[ImageSet, np.ndarray],
) -> None:
    """One row of pictures an axes: a query, then its neighbours; a frame tells whether the label agrees.

    Args:
        similar: rows of the bank, ``(len(axes), k)``.
        queries, bank: an image set and the rows of it that are meant.
    """
    for axis, wanted, found in zip(axes, queries[1], similar, strict=True):
        strip = [(queries[0], wanted), *((bank[0], bank[1][row]) for row in found)]
        for place, (images, row) in enumerate(strip):
            shift = place * 1.1 + (0.3 if place else 0)
            axis.imshow(images.read(int(row)), extent=(shift, shift + 1, 0, 1), interpolation="nearest")
            if place:
                agrees = images.labels[row] == queries[0].labels[wanted]
                frame = {"edgecolor": GREEN if agrees else RED, "facecolor": "none", "linewidth": 2}
                axis.add_patch(matplotlib.patches.Rectangle((shift, 0), 1, 1, **frame))
        axis.set(xlim=(-0.05, len(strip) * 1.1 + 0.25), ylim=(-0.05, 1.05))
        axis.axis("off")
    axes[0].set_title(title, fontsize=10)


def neighbour_strips(
    path: str | Path,
    queries: tuple[ImageSet, np.ndarray],
    bank: tuple[ImageSet, np.ndarray],
    columns: dict[str, tuple[np.ndarray, np.ndarray]],
    count: int = 8,
    k: int = 6,
) -> Path:
    """``neighbours.png``: the same held-out pictures and what each column's features find nearest in training.

    Args:
        queries, bank: an image set and the rows that features belong to.
        columns: title -> unit features of the queries and of the bank, as rows ``(m, D)`` and ``(n, D)``.
        count: how many queries, spread over the held-out rows.
        k: neighbours each.
    """
    count = min(count, len(queries[1]))
    chosen = np.linspace(0, len(queries[1]) - 1, count).astype(int)
    figure = Figure(figsize=(4.6 * len(columns), 0.62 * count + 0.4))
    grid = figure.subplots(count, len(columns), squeeze=False)
    for column, (title, (query_features, bank_features)) in enumerate(columns.items()):
        _, similar = neighbours(bank_features, query_features[chosen], min(k, len(bank_features)))
        draw_neighbours(grid[:, column], title, similar, (queries[0], queries[1][chosen]), bank)
    figure.subplots_adjust(hspace=0.08, wspace=0.05)
    return save(figure, path)
