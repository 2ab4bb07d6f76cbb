"""The picture and the table of a linear evaluation: accuracy over the rate."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from sslzoo.report.pictures import BLUE, ORANGE, draw_loss, save


def rate_table(curve: list[dict], chosen: int, rate: str) -> Table:
    """Every classifier of a sweep; the chosen one is marked."""
    table = Table("features", rate, "on the choosing part, %", "held out, %", title="linear top-1")
    for place, row in enumerate(curve):
        chance = "-" if row["selection_top1"] is None else f"{100 * row['selection_top1']:.2f}"
        mark = "*" if place == chosen else ""
        table.add_row(row["features"], f"{row['lr']:g}{mark}", chance, f"{100 * row['val_top1']:.2f}{mark}")
    return table


def rate_curves(
    curve: list[dict], chosen: int, path: str | Path, title: str, rate: str, rows: Sequence[dict] = ()
) -> Path:
    """``curves.png``: accuracy over the rate, by kind of feature; beside it the loss over steps, if ``rows`` has one.

    Args:
        curve: rows of ``features``, ``lr``, ``selection_top1``, ``val_top1``.
        chosen: the row to mark.
        path: where to.
        title: of the figure.
        rate: what ``lr`` means.
        rows: of ``metrics.csv``.
    """
    figure = Figure(figsize=(8 if rows else 4.5, 3.2))
    axes = figure.subplots(1, 2 if rows else 1, squeeze=False)[0]
    for kind, colour in zip(dict.fromkeys(row["features"] for row in curve), (BLUE, ORANGE), strict=False):
        own = sorted((row for row in curve if row["features"] == kind), key=lambda row: row["lr"])
        lrs = [row["lr"] for row in own]
        axes[0].plot(lrs, [100 * row["val_top1"] for row in own], color=colour, marker="o", markersize=3, label=kind)
        if own[0]["selection_top1"] is not None:
            chances = [100 * row["selection_top1"] for row in own]
            axes[0].plot(lrs, chances, color=colour, linestyle="--", linewidth=1, label=f"{kind}, choosing part")
    best = curve[chosen]
    axes[0].plot(best["lr"], 100 * best["val_top1"], "o", markersize=9, fillstyle="none", color="#333333")
    axes[0].set(title="linear top-1, %", xlabel=rate, xscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    if rows:
        draw_loss(axes[1], list(rows))
        axes[1].set(title="loss of the best on training crops")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return save(figure, path)
