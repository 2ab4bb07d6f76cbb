"""The scores of many runs as one table: means over seeds, and no mean over things that differ.

A row is a method under one configuration, a column a score under one protocol. Values are those of the final epoch.
"""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sslzoo.errors import UserError
from sslzoo.report.found import RANDOM, RAW, Run, read_run
from sslzoo.report.protocol import Column, finite, measured, protocols

# Cells: seeds


@dataclass
class Cell:
    """A score's values, by seed of pretraining; several of one seed count as one.

    Attributes:
        by_seed: seed -> values.
        intervals: ``(low, high)`` where runs told them.
    """

    by_seed: dict[object, list[float]] = field(default_factory=dict)
    intervals: list[tuple[float, float]] = field(default_factory=list)

    def add(self, seed: object, value: float, interval: object = None) -> None:
        self.by_seed.setdefault(seed, []).append(value)
        if isinstance(interval, list | tuple) and len(interval) == 2 and all(finite(end) for end in interval):
            self.intervals.append((float(interval[0]), float(interval[1])))

    @property
    def values(self) -> list[float]:
        """One a seed."""
        return [statistics.fmean(values) for values in self.by_seed.values()]

    @property
    def seeds(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None of one seed."""
        return statistics.stdev(self.values) if self.seeds > 1 else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean over seeds; None of one seed."""
        return None if self.sd is None else self.sd / math.sqrt(self.seeds)

    @property
    def interval(self) -> tuple[float, float] | None:
        """That of the held-out images, where there is one seed and one interval."""
        return self.intervals[0] if self.seeds == 1 and len(self.intervals) == 1 else None

    @property
    def _least_error(self) -> float | None:
        """The standard error, or what the held-out images alone make of it (a 95 % interval is 3.92 of them wide)."""
        if self.standard_error is not None or self.interval is None:
            return self.standard_error
        return (self.interval[1] - self.interval[0]) / 3.92

    def against(self, best: "Cell") -> str:
        """``~`` within two standard errors of ``best``, ``?`` where one seed cannot tell, else nothing."""
        if self is best:
            return ""
        errors = self._least_error, best._least_error
        if None not in errors and abs(self.mean - best.mean) <= 2 * math.hypot(*errors):
            return "~"
        return "?" if None in (self.sd, best.sd) else ""


# Rows: methods


@dataclass
class Row:
    """One method under one configuration, or a baseline.

    Attributes:
        method: its name.
        hash: of the configuration without the seed.
        recipe: that configuration.
        runs: all that count here, evaluations too.
        cells: column -> values.
        before: column -> values of the same encoder at its random start.
        variant: what tells it from other rows of its method.
        baseline: whether nothing was trained.
    """

    method: str
    hash: str = "-"
    recipe: dict[str, object] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    cells: dict[Column, Cell] = field(default_factory=dict)
    before: dict[Column, Cell] = field(default_factory=dict)
    variant: str = ""
    baseline: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}, {self.variant}" if self.variant else self.method

    @property
    def pretrained(self) -> list[Run]:
        """The training runs, by seed."""
        return sorted((run for run in self.runs if run.task == "pretrain"), key=lambda run: str(run.seed))

    @property
    def seeds(self) -> int:
        return max((cell.seeds for cell in self.cells.values()), default=0)

    @property
    def versions(self) -> str:
        """``sslzoo 0.1.0, torch 2.15.0``, all that took part."""
        told: dict[str, set[str]] = {}
        for run in self.runs:
            for name, number in dict(run.summary.get("versions") or {}).items():
                told.setdefault(name, set()).add(str(number))
        return ", ".join(f"{name} {'/'.join(sorted(told[name]))}" for name in ("sslzoo", "torch") if name in told)

    def spent(self, key: str) -> float | None:
        """The mean of a number that every training run of this row reports, such as ``seconds``."""
        values = [run.summary[key] for run in self.pretrained if finite(run.summary.get(key))]
        return statistics.fmean(values) if values else None


@dataclass
class Table:
    """Rows and columns, the best first; ``best[column]`` is the best cell of a trained method."""

    rows: list[Row]
    columns: list[Column]
    protocols: dict[Column, str]
    best: dict[Column, Cell]

    def mark(self, row: Row, column: Column) -> str:
        """How a cell compares with the best of its column, see ``Cell.against``; of a baseline only ``~`` is said."""
        mark = row.cells[column].against(self.best[column]) if column in self.best else ""
        return "" if row.baseline and mark == "?" else mark

    def on(self, data: str) -> tuple[list[Row], list[Column]]:
        """The part that was measured on one set."""
        columns = [column for column in self.columns if column.data == data]
        return [row for row in self.rows if row.cells.keys() & set(columns)], columns

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(column.data for column in self.columns))

    @property
    def methods(self) -> list[Row]:
        return [row for row in self.rows if not row.baseline]


def tabulate(runs: Sequence[Run]) -> Table:
    """Group runs by method and configuration, scores by protocol; evaluations join the row of their backbone."""
    rows: dict[tuple, Row] = {}
    homes = _Homes(runs)
    for run in runs:
        key, row, seed = _row_of(run, homes(run))
        row = rows.setdefault(key, row)
        row.runs.append(run)
        for column, (value, interval) in measured(run).items():
            row.cells.setdefault(column, Cell()).add(seed, value, interval)
            for ending, name in ((RANDOM, "random init"), (RAW, "raw pixels")):
                if not finite(start := run.summary.get(column.score + ending)):
                    continue
                encoder = _encoder(run) if ending == RANDOM else {}
                base = rows.setdefault((name, *sorted(encoder.items())), Row(name, recipe=encoder, baseline=True))
                base.cells.setdefault(column, Cell()).add(seed, float(start))
                if ending == RANDOM:
                    row.before.setdefault(column, Cell()).add(seed, float(start))
    kept = [row for row in rows.values() if row.cells]
    _tell_apart(kept)
    columns = _ordered(kept)
    best = {}
    for column in columns:
        cells = [row.cells[column] for row in kept if column in row.cells and not row.baseline]
        if cells:
            best[column] = (min if column.lower else max)(cells, key=lambda cell: cell.mean)
    return Table(sorted(kept, key=lambda row: _rank(row, columns)), columns, protocols(columns), best)


class _Homes:
    """From a run to those that made the weights it speaks of, and so to its row."""

    def __init__(self, runs: Sequence[Run]):
        self.by_folder = {run.folder.resolve(): run for run in runs}
        self.told: dict[str, list[Run]] = {}  # by the path that a run named when it was made
        for run in runs:
            self.told.setdefault(str(run.summary.get("backbone")), []).append(run)

    def __call__(self, run: Run) -> list[Run]:
        """The pretraining run and what was trained on top of it before ``run``; empty where that is unknown."""
        if run.task == "pretrain":
            return [run]
        teacher = run.summary.get("teacher")  # a student's score is one of the teacher's method
        source = (
            self._run_at(Path(teacher), "") if isinstance(teacher, str) else self._run_at(run.source_folder, run.source)
        )
        if source is None or source is run:
            return []
        below = self(source)
        return below if isinstance(teacher, str) or source.task == "pretrain" else [*below, source]

    def _run_at(self, folder: Path, told: str) -> Run | None:
        known = self.by_folder.get(folder.resolve())
        moved = [run for run in self.told.get(told, []) if run.task == "pretrain"]
        if known or len(moved) == 1:
            return known or moved[0]
        try:
            return read_run(folder)  # it lies elsewhere
        except UserError:
            return None


def _row_of(run: Run, home: Sequence[Run]) -> tuple[tuple, Row, object]:
    """The key, a new row and the seed that a run counts under."""
    if home:
        method = " + ".join([home[0].method, *(step.task for step in home[1:])])
        row = Row(method, home[-1].hash, {key: value for step in home for key, value in step.recipe.items()})
        return (method, *((step.hash, *step.root.values()) for step in home)), row, home[0].seed
    if run.source == "random":
        encoder = _encoder(run)
        return ("random init", *sorted(encoder.items())), Row("random init", recipe=encoder, baseline=True), run.seed
    known = run.source.startswith("timm/")
    method = run.method if run.summary.get("pretrained", True) else f"{run.method}, random init"
    return (method, run.source), Row(method, variant="" if known else run.source), run.seed


def _encoder(run: Run) -> dict[str, str]:
    """What a random start is made of; what is dropped in training is not dropped in evaluation."""
    settings = {key: value for key, value in run.config.items() if key.startswith("encoder.") and "drop" not in key}
    return {key: str(value) for key, value in settings.items() if value not in ({}, None)}


def _tell_apart(rows: Sequence[Row]) -> None:
    """Name the settings in which rows of one method differ."""
    for row in rows:
        others = [other.recipe for other in rows if other.method == row.method and other is not row]
        if not others or row.variant:
            continue
        kind, kinds = _kind(row.recipe), [_kind(recipe) for recipe in others]
        if row.baseline and kind not in kinds:
            row.variant = kind
            continue
        keys = dict.fromkeys(key for recipe in (row.recipe, *others) for key in recipe)
        differing = [key for key in keys if any(other.get(key) != row.recipe.get(key) for other in others)]
        said = [f"{key.removeprefix('encoder.')}={_short(row.recipe.get(key, '-'))}" for key in differing[:3]]
        row.variant = ", ".join([*said, "..."] if len(differing) > 3 else said) or row.hash


def _kind(recipe: dict) -> str:
    return str(recipe.get("encoder._target_", "Encoder")).rpartition(".")[2]


def _short(value: object) -> str:
    return "null" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _ordered(rows: Sequence[Row]) -> list[Column]:
    """All columns, those that compare most methods first, a training run's own kNN before others."""
    columns = dict.fromkeys(column for row in rows for column in row.cells)
    count = {column: sum(column in row.cells for row in rows if not row.baseline) for column in columns}
    most = {data: max(n for column, n in count.items() if column.data == data) for data in {c.data for c in columns}}

    def order(c: Column) -> tuple:
        return -most[c.data], c.data, -count[c], c.task != "pretrain", c.task, *_places(c.score), _natural(c.settings)

    return sorted(columns, key=order)


def _natural(settings: tuple[tuple[str, str], ...]) -> list[tuple[str, int, str]]:
    """8 before 16 before all."""
    return [(key, 0 if value[:1].isdigit() else 1, value.zfill(12)) for key, value in settings]


def _places(score: str) -> tuple:
    return (not score.endswith("top1"), score)


def _rank(row: Row, columns: Sequence[Column]) -> tuple:
    """Trained methods before baselines; by the first column that has a value."""
    place = next(i for i, column in enumerate(columns) if column in row.cells)
    mean = row.cells[columns[place]].mean
    return row.baseline, place, mean if columns[place].lower else -mean, row.name


# Files


def said(column: Column, cell: Cell, mark: str = "") -> str:
    """A cell as text: ``64.3 ± 0.5 (3)``; mean, standard deviation, seeds."""
    sd = "-" if cell.sd is None else column.shown(cell.sd, cell.mean)
    return f"{column.shown(cell.mean)} ± {sd} ({cell.seeds})" + (f" {mark}" if mark else "")


LEGEND = (
    "Mean ± standard deviation (seeds) of final-epoch values. `~`: within two standard errors of the column's best"
    " method; `?`: one seed, which cannot tell."
)


def markdown(table: Table) -> str:
    """``table.md``: a table for each set that was measured on."""
    parts = []
    for data in table.sets:
        rows, columns = table.on(data)
        heads = [" ".join(filter(None, (c.title, f"({table.protocols[c]})"))).removesuffix(" ()") for c in columns]
        lines = [["method", *heads, "seeds", "config", "versions"]]
        lines.append(["---", *["---:"] * (len(columns) + 1), "---", "---"])
        for row in rows:
            cells = [said(c, row.cells[c], table.mark(row, c)) if c in row.cells else "" for c in columns]
            lines.append([row.name, *cells, str(row.seeds), row.hash, row.versions])
        body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        parts.append(f"## {data}\n\n{body}\n")
    return "\n".join([*parts, LEGEND + "\n"])


CSV = (
    *("data", "method", "variant", "task", "score", "protocol", "mean", "sd", "seeds", "standard_error", "mark"),
    *("low", "high", "random_init", "config_hash", "versions", "runs"),
)


def csv_text(table: Table) -> str:
    """``table.csv``: a line for each cell, values as they were reported (0 to 1, not percent)."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV, lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        for column in (column for column in table.columns if column in row.cells):
            cell, before = row.cells[column], row.before.get(column)
            low, high = cell.interval or (None, None)
            runs = [run.folder for run in row.runs if column in measured(run)]
            writer.writerow(
                {
                    "data": column.data,
                    "method": row.method,
                    "variant": row.variant,
                    "task": column.task,
                    "score": column.score,
                    "protocol": " ".join(f"{key}={value}" for key, value in column.settings),
                    "mean": cell.mean,
                    "sd": "-" if cell.sd is None else cell.sd,
                    "seeds": cell.seeds,
                    "standard_error": "-" if cell.standard_error is None else cell.standard_error,
                    "mark": table.mark(row, column),
                    "low": low,
                    "high": high,
                    "random_init": before and before.mean,
                    "config_hash": row.hash,
                    "versions": row.versions,
                    "runs": " ".join(map(str, runs)),
                }
            )
    return text.getvalue()
