"""Pictures of a segmenter: its curves, class maps beside the truth, and class maps as files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from sslzoo.checkpoints.files import write_whole
from sslzoo.data.box_set import IGNORE
from sslzoo.data.maps import MapSet
from sslzoo.report.pictures import BLUE, GREEN, INK, draw_shares, save, training_curves


def palette() -> np.ndarray:
    """PASCAL VOC's colours of classes, ``(256, 3)`` uint8: three bits of a number for each bit of red, green, blue."""
    numbers = np.arange(256)[:, None]
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        colours |= (numbers >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def write_maps(folder: Path, images: MapSet, maps: Iterable[Tensor]) -> None:
    """``folder/IMAGE.png`` for every image of the set: class numbers, with PASCAL's colours as palette."""
    folder.mkdir(exist_ok=True)
    for image, found in zip(images.image_ids, maps, strict=True):
        write_map(folder / f"{image}.png", found)


def write_map(path: Path, found: Tensor) -> None:
    """Class numbers ``(H, W)`` uint8 as a PNG, with PASCAL's colours as palette."""
    picture = Image.fromarray(found.numpy())
    picture.putpalette(palette().tobytes())
    write_whole(path, lambda partial: picture.save(partial, format="PNG"))


def curves(rows: list[dict], path: str | Path, title: str) -> Path:
    """``curves.png``: loss, mean IoU and pixel accuracy, speed."""
    lines = {"pixel_accuracy": ("pixel accuracy", GREEN), "miou": ("mIoU", BLUE)}
    return training_curves(rows, path, title, lambda axes: draw_shares(axes, rows, lines, "held-out images, %"))


def some_rows(images: MapSet, count: int = 8) -> np.ndarray:
    """A few rows, spread over the set."""
    return np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)


def predictions(
    path: str | Path, images: MapSet, rows: np.ndarray, maps: Sequence[Tensor], title: str, columns: int = 2
) -> Path:
    """``predictions.png``: photograph, truth and what was found, in one colour a class; white is not scored.

    Args:
        images: the set.
        rows: of the images that are shown.
        maps: what was found in each of them, ``(H, W)``.
    """
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(5.4 * columns, 1.9 * lines + 0.8))
    grid = figure.subplots(lines, 3 * columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    shown: set[int] = set()
    for k, (row, found) in enumerate(zip(rows.tolist(), maps, strict=True)):
        truth = images.class_map(row).numpy()
        for axes, each in zip(grid[3 * k :], (images.picture(row), truth, found.numpy()), strict=False):
            axes.imshow(_coloured(each) if each.ndim == 2 else each, interpolation="nearest")
        shown |= set(np.unique(truth).tolist()) | set(np.unique(found.numpy()).tolist())
    names = sorted(shown - {IGNORE})[:24]
    patches = [Patch(facecolor=palette()[k] / 255, edgecolor=INK, linewidth=0.5, label=images.map_classes[k])
               for k in names]  # fmt: skip
    figure.legend(handles=patches, loc="lower center", ncols=9, fontsize=7, frameon=False)
    figure.suptitle(f"{title}\nphotograph, truth, prediction", fontsize=9, color=INK)
    height = 1.9 * lines + 0.8
    figure.subplots_adjust(hspace=0.05, wspace=0.05, top=1 - 0.5 / height, bottom=0.45 / height)
    return save(figure, path)


def _coloured(classes: np.ndarray) -> np.ndarray:
    """``(H, W) -> (H, W, 3)`` uint8."""
    colours = palette()
    colours[IGNORE] = 255
    return colours[classes]
