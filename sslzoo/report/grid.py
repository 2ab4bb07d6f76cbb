"""Many cells of pre-training and self-training as the paper's tables, and as its Figure 1 (Zoph et al. 2020)."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from sslzoo.report.pictures import BLUE, GREEN, INK, ORANGE, RED, save
from sslzoo.report.table import Cell

SHARES = (0.25, 0.5)  # of the steps, at which the table is read beside their end
NEAR = 0.1  # of the steps: a look farther from a share than this does not stand for it
STRENGTHS = ("s1", "s2", "s3", "s4")


def _published() -> dict[tuple[str, bool, str, float], float]:
    """AP on COCO of EfficientNet-B7 RetinaNet, by init, self-training, augmentation and part of the labels."""
    by_strength = {  # figure 1 left and table 2
        ("random", False): (39.2, 41.5, 43.9, 44.3),
        ("imagenet", False): (39.5, 40.7, 43.2, 43.3),
        ("random", True): (40.9, 43.0, 45.4, 45.6),
    }
    by_fraction = {  # figure 1 right and table 3, with S4
        ("random", False): (30.7, 39.6, 44.3),
        ("random", True): (34.1, 41.4, 45.6),
        ("imagenet", False): (33.3, 38.8, 43.3),
        ("imagenet", True): (36.0, 40.5, 44.6),
    }
    found = {(*row, strength, 1.0): ap for row, line in by_strength.items() for strength, ap in zip(STRENGTHS, line,
             strict=True)}  # fmt: skip
    for row, line in by_fraction.items():
        found |= {(*row, "s4", part): ap for part, ap in zip((0.2, 0.5, 1.0), line, strict=True)}
    return found


PUBLISHED = _published()
PUBLISHED_RESNET50 = {  # table 4: ResNet-50, all labels, S4
    ("random", False): 41.1,
    ("imagenet", False): 40.4,
    ("simclr", False): 40.4,
    ("random", True): 41.9,
}


PUBLISHED_JOINT = {  # table 7: 20 % of the labels, S4; alone and jointly with ImageNet's classes
    ("random", False): (30.7, 33.6),
    ("random", True): (34.1, 35.1),
    ("imagenet", False): (33.3, 34.0),
    ("imagenet", True): (36.0, 36.6),
}


Looks = list[tuple[int, int, float]]  # step, of all steps, score


@dataclass(frozen=True)
class Row:
    """An initialisation, with self-training or without.

    Attributes:
        init: its name in the table.
        self_training: whether a student was trained on pseudo-labels too.
    """

    init: str
    self_training: bool = False

    @property
    def name(self) -> str:
        return f"{self.init} + self-training" if self.self_training else self.init


@dataclass(frozen=True)
class Column:
    """An augmentation and a part of the labels; ``name`` is what tells it from the others.

    ``joint`` is false where classes are not learned beside although the grid's command names some.
    """

    name: str
    augment: str
    label_fraction: float
    joint: bool = True


@dataclass
class Grid:
    """What is known of a grid's cells; values are from 0 to 1.

    Attributes:
        kind: ``fraction``, ``augment``, ``init`` or ``joint``.
        data: name of the set.
        rows, columns: in the table's order.
        metric: ``AP`` of boxes, ``mIoU`` of pixels, ``top-1`` of images.
        as_published: whether cells are trained as the paper's are, which then stand beside them.
        scores: (row, column) -> score by seed.
        controls: of a row with self-training: that of the labels alone, from as many images as the student saw.
        runs: (row, column) -> what cells said of themselves: parts, pseudo-labels.
        curves: (row, column) -> for each seed ``(step, of all steps, score)`` along the run.
        control_curves: the same of ``controls``.
    """

    kind: str
    data: str
    rows: list[Row]
    columns: list[Column]
    metric: str = "AP"
    as_published: bool = True
    scores: dict[tuple[Row, Column], Cell] = field(default_factory=dict)
    controls: dict[tuple[Row, Column], Cell] = field(default_factory=dict)
    runs: dict[tuple[Row, Column], list[dict]] = field(default_factory=dict)
    curves: dict[tuple[Row, Column], list[Looks]] = field(default_factory=dict)
    control_curves: dict[tuple[Row, Column], list[Looks]] = field(default_factory=dict)

    def reference(self, row: Row, column: Column) -> tuple[Row, Column] | None:
        """The cell that one is compared with, as the paper does.

        Its Table 3 (``fraction``) compares self-training with the same init without it; Table 7 (``joint``) all with
        the same init without it and with boxes alone; Tables 2 and 4 (``augment``, ``init``) every row with random
        init in the same column.
        """
        if self.kind == "joint":
            base = Row(row.init), self.columns[0]
        elif self.kind == "fraction":
            base = (Row(row.init) if row.self_training else row), column
        else:
            base = Row("random"), column
        return None if base == (row, column) else base

    def published(self, row: Row, column: Column) -> float | None:
        """The paper's AP in percent, where it has this cell."""
        of = row.init, row.self_training
        strong, whole = column.augment == "s4", column.label_fraction == 1.0
        if self.metric != "AP" or not self.as_published:
            return None
        if self.kind == "init":
            return PUBLISHED_RESNET50.get(of) if strong and whole else None
        if self.kind == "joint":
            there = strong and column.label_fraction == 0.2 and of in PUBLISHED_JOINT
            return PUBLISHED_JOINT[of][column.joint] if there else None
        return PUBLISHED.get((*of, column.augment, column.label_fraction))


def difference(cell: Cell, other: Cell) -> str:
    """``+1.3``: by how much of 100 a cell is above another; ``~`` under two standard errors, ``?`` of one seed."""
    delta = cell.mean - other.mean
    errors = cell.standard_error, other.standard_error
    mark = " ?" if None in errors else " ~" if abs(delta) < 2 * math.hypot(*errors) else ""
    return f"{100 * delta:+.1f}{mark}"


def value(cell: Cell) -> str:
    """``64.3 ± 0.5 (3)``: mean, standard deviation, seeds; without the middle of one seed."""
    spread = "" if cell.sd is None else f" ± {100 * cell.sd:.1f}"
    return f"{100 * cell.mean:.1f}{spread} ({cell.seeds})"


def along(curves: Sequence[Looks], share: float) -> float | None:
    """The score at the look nearest to ``share`` of the steps, the seeds' mean; None where one has no look near it."""
    found = []
    for looks in curves:
        near = [look for look in looks if abs(look[0] - share * look[1]) <= NEAR * look[1]]
        if not near:
            return None
        found.append(min(near, key=lambda look: abs(look[0] - share * look[1]))[2])
    return statistics.fmean(found) if found else None


# Tables


def markdown(grid: Grid) -> str:
    """``table.md``: the paper's form, what it cost, and the same earlier in the runs."""
    parts = [f"## grid={grid.kind}, {grid.data}: {grid.metric} in %\n", _table(grid)]
    published = any(grid.published(row, column) for row in grid.rows for column in grid.columns)
    parts.append(f"{LEGENDS[grid.kind]}{LEGEND}{OF_THE_PAPER if published else ''}\n")
    if any(grid.runs.values()):
        parts += ["## What the cells were made of\n", _made_of(grid)]
    for share in SHARES:
        lines = [
            [name, *[_percent(along(curves.get((row, column), []), share)) for column in grid.columns]]
            for row in grid.rows
            for name, curves in ((row.name, grid.curves), (_control_of(row), grid.control_curves))
        ]
        lines = [line for line in lines if any(line[1:])]
        if lines:
            parts += [f"## After about {share:.0%} of each cell's steps\n", _lines(["setup", *_names(grid)], lines)]
    return "\n".join(parts)


def _control_of(row: Row) -> str:
    return f"{row.init}, control of as many images"


def _names(grid: Grid) -> list[str]:
    return [column.name for column in grid.columns]


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def _table(grid: Grid) -> str:
    lines = []
    for row in grid.rows:
        line, control, paper = [row.name], [_control_of(row)], [f"*paper: {row.name}*"]
        for column in grid.columns:
            base = grid.reference(row, column)
            cell, other = grid.scores.get((row, column)), grid.scores.get(base) if base else None
            delta = f" ({difference(cell, other)})" if cell and other else ""
            line.append(value(cell) + delta if cell else "failed")
            alone = grid.controls.get((row, column))
            control.append(f"{value(alone)} (student {difference(cell, alone)})" if cell and alone else "")
            known, reference = grid.published(row, column), grid.published(*base) if base else None
            above = f" ({known - reference:+.1f})" if known is not None and reference is not None else ""
            paper.append("" if known is None else f"*{known:.1f}{above}*")
        lines += [each for each in (line, control, paper) if each is line or any(each[1:])]
    if grid.kind in ("fraction", "joint"):
        lines += _derived(grid)
    return _lines(["setup", *_names(grid)], lines)


def _derived(grid: Grid) -> list[list[str]]:
    """What pre-training brings: each init against random, neither with self-training."""
    lines = []
    for init in dict.fromkeys(row.init for row in grid.rows if row.init != "random"):
        line = [f"{init} - random"]
        for column in grid.columns:
            cells = [grid.scores.get((Row(name), column)) for name in (init, "random")]
            line.append(difference(*cells) if None not in cells else "")
        lines.append(line)
    return lines


def _lines(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines]) + "\n"


COSTS = (
    ("labelled images", lambda run: run["labelled_images"], "{:.0f}"),
    ("steps, supervised", lambda run: run["supervised"]["steps"], "{:.0f}"),
    ("steps, student", lambda run: run["student"]["steps"], "{:.0f}"),
    ("images seen, supervised", lambda run: run["supervised"]["images_seen"], "{:.0f}"),
    ("images seen, student", lambda run: run["student"]["images_seen"], "{:.0f}"),
    ("images seen, control", lambda run: run["control"]["images_seen"], "{:.0f}"),
    ("pseudo-boxes an image", lambda run: run["pseudo"]["boxes_per_image"], "{:.2f}"),
    ("labelled boxes an image", lambda run: run["pseudo"]["labelled_boxes_per_image"], "{:.2f}"),
    ("threshold", lambda run: run["pseudo"]["threshold"], "{:.2f}"),
    ("images labelled", lambda run: run["pseudo"]["images"], "{:.0f}"),
    ("images without a pseudo-box", lambda run: run["pseudo"]["empty"], "{:.0%}"),
    ("precision of pseudo-boxes", lambda run: run["pseudo"]["precision"], "{:.2f}"),
    ("recall of pseudo-labels", lambda run: run["pseudo"]["recall"], "{:.2f}"),
    ("pixels with a pseudo-label", lambda run: run["pseudo"]["labelled_pixels"], "{:.0%}"),
    ("images with a pseudo-label", lambda run: run["pseudo"]["share"], "{:.0%}"),
    ("pseudo-labels that are right", lambda run: run["pseudo"]["right"], "{:.0%}"),
)


def _made_of(grid: Grid) -> str:
    lines = []
    for row in grid.rows:
        for name, of, form in COSTS:
            line = [f"{row.name}: {name}"]
            for column in grid.columns:
                number = _mean(grid.runs.get((row, column), []), of)
                line.append("" if number is None else form.format(number))
            if any(line[1:]):
                lines.append(line)
    return _lines(["", *_names(grid)], lines)


def _mean(runs: Sequence[dict], of) -> float | None:
    found = []
    for run in runs:
        try:
            found.append(of(run))
        except KeyError:  # a cell without self-training, labels that could not be judged, or of another kind
            continue
    return statistics.fmean(found) if found else None


LEGENDS = {
    "fraction": "In brackets: against the same init without self-training, as in the paper's Table 3.",
    "augment": "In brackets: against random init in the same column, as in the paper's Table 2.",
    "init": "In brackets: against random init, as in the paper's Table 4.",
    "joint": "In brackets: against the same init and boxes alone, without self-training, as in the paper's Table 7.",
}
LEGEND = (
    " Mean ± standard deviation (seeds). `~`: under two standard errors; `?`: one seed, which cannot tell. Student and"
    " supervised row have the same labelled images, start and optimizer steps; the student sees pseudo-labelled images"
    " besides, so the control sees the labelled ones as often as the student sees all (the teacher's cost is on top)."
)
OF_THE_PAPER = (
    " In italics: the paper's numbers (COCO; EfficientNet-B7, or ResNet-50 by init), another model on other data."
)


CSV = (
    *("grid", "data", "setup", "init", "self_training", "column", "augment", "label_fraction", "seed", "part"),
    *("step", "steps", "metric", "score"),
)


def csv_text(grid: Grid) -> str:
    """``table.csv``: a line for each look at each cell, 0 to 1; a part's last is its score."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV)
    for row in grid.rows:
        for column in grid.columns:
            about = (grid.kind, grid.data, row.name, row.init, row.self_training, column.name, column.augment,
                     column.label_fraction)  # fmt: skip
            for part, scores, curves in (
                ("student" if row.self_training else "supervised", grid.scores, grid.curves),
                ("control", grid.controls, grid.control_curves),
            ):
                seeds = list(scores[row, column].by_seed) if (row, column) in scores else []
                for seed, looks in zip(seeds, curves.get((row, column), []), strict=False):
                    writer.writerows((*about, seed, part, *look[:2], grid.metric, look[2]) for look in looks)
    return text.getvalue()


def figure(grid: Grid, path: str | Path) -> Path:
    """``figure.png``, in the form of the paper's Figure 1: scores over columns, a line a row, controls dotted."""
    drawn = Figure(figsize=(1.3 * len(grid.columns) + 3.5, 3.6))
    axes = drawn.subplots()
    colours = dict(zip(dict.fromkeys(row.init for row in grid.rows), (BLUE, ORANGE, GREEN, RED, INK) * 3, strict=False))
    for row in grid.rows:
        for cells, style, marker, name in (
            (grid.scores, *(("--", "s") if row.self_training else ("-", "o")), row.name),
            (grid.controls, ":", "x", f"{row.init}, control"),
        ):
            found = [(k, cells[row, column]) for k, column in enumerate(grid.columns) if (row, column) in cells]
            if found:
                places, means = [k for k, _ in found], [100 * cell.mean for _, cell in found]
                spread = [100 * (cell.sd or 0) for _, cell in found]
                look = {"color": colours[row.init], "linestyle": style, "marker": marker, "markersize": 5, "capsize": 2}
                axes.errorbar(places, means, spread, label=name, linewidth=1.4, **look)
    axes.set_xticks(range(len(grid.columns)), _names(grid))
    axes.set_xlim(-0.4, len(grid.columns) - 0.6)
    wanted = {"fraction": "part of the labels", "augment": "augmentation", "init": "", "joint": ""}
    axes.set(title=f"{grid.data}: pre-training and self-training", xlabel=wanted[grid.kind], ylabel=f"{grid.metric}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(drawn, path)
