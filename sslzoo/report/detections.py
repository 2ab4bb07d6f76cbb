"""Pictures of a detector: its curves, and what it found beside what there is."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sslzoo.data.box_set import BoxSet
from sslzoo.report.pictures import BLUE, GREEN, INK, ORANGE, draw_shares, save, training_curves


def curves(rows: list[dict], path: str | Path, title: str) -> Path:
    """``curves.png``: loss, average precision, speed."""
    lines = {"map_50": ("AP50", ORANGE), "map": ("AP", BLUE)}
    return training_curves(rows, path, title, lambda axes: draw_shares(axes, rows, lines, "average precision, %"))


def draw_boxes(axes: Axes, boxes: Tensor, names: Sequence[str], colour: str, style: str = "-") -> None:
    """Frames around ``boxes`` (n, 4), each with its name above, where there is one."""
    for (x1, y1, x2, y2), name in zip(boxes.tolist(), names, strict=True):
        frame = {"edgecolor": colour, "facecolor": "none", "linewidth": 1.4, "linestyle": style}
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, **frame))
        if name:
            back = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            axes.text(x1 - 0.5, y1 - 1.5, name, fontsize=5.5, color="white", va="bottom", bbox=back, clip_on=True)


def predictions(
    path: str | Path,
    images: BoxSet,
    found: Sequence[dict],
    title: str,
    count: int = 12,
    least: float = 0.3,
    columns: int = 4,
) -> Path:
    """``predictions.png``: some held-out images with their boxes, dashed, and those found, with class and score.

    Args:
        images: the set.
        found: what a detector found in each of them.
        count: how many images, spread over the set.
        least: boxes of a lower score are not drawn.
    """
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist()
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.6 * lines + 0.5))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(grid, chosen, strict=False):
        image, target = images.read(i)
        axes.imshow(image, interpolation="nearest")
        draw_boxes(axes, target["boxes"], [""] * len(target["boxes"]), GREEN, "--")
        sure = found[i]["scores"] >= least
        labels, scores = found[i]["labels"][sure].tolist(), found[i]["scores"][sure].tolist()
        names = [f"{images.classes[label - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        draw_boxes(axes, found[i]["boxes"][sure], names, ORANGE)
        axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    figure.suptitle(f"{title}\ngreen, dashed: annotated; orange: found, score {least} or more", fontsize=9, color=INK)
    figure.subplots_adjust(hspace=0.05, wspace=0.05, top=1 - 0.55 / (2.6 * lines + 0.5))
    return save(figure, path)
