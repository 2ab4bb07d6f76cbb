"""A grid of cells of pre-training and self-training: what is there is not done again, the rest side by side."""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sslzoo.blocks import Encoder
from sslzoo.checkpoints.files import write_text
from sslzoo.config import composed, config_hash, keys_of, plain
from sslzoo.errors import UserError
from sslzoo.report.csv_log import read_rows
from sslzoo.report.grid import Column, Grid, Row, csv_text, figure, markdown
from sslzoo.report.progress import console
from sslzoo.report.table import Cell
from sslzoo.tasks.jobs import side_by_side, together
from sslzoo.tasks.parts import initial, moved, word
from sslzoo.tasks.runs import provenance, write_summary
from sslzoo.tasks.selftrain_cell import Kind, check, kind_of, steps_of
from sslzoo.tasks.training import started

GRIDS = ("fraction", "augment", "init", "joint")
OF_THE_GRID = ("grid", "fractions", "augments", "seeds", "jobs", "cells", "run_dir", "resume")
OF_A_CELL = ("init", "augment", "label_fraction", "seed", "self_training")


@dataclass(frozen=True)
class Place:
    """One column and init at one seed: the supervised row there, and on top of the same teacher the self-trained one.

    Attributes:
        init: as it was typed.
        named: in the table.
    """

    init: str
    named: str
    column: Column
    seed: int


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """All cells that are not there yet, then ``table.md``, ``table.csv`` and ``figure.png``."""
    kept = [word for word in overrides if word.partition("=")[0] not in (*OF_THE_GRID, *OF_A_CELL)]
    named = inits(config)
    grid = layout(config, named)
    cells = places(config, grid, named)
    words = {place: cell_words(place, trains, kept) for place, trains in cells.items()}
    configs = {place: composed(words[place]) for place in cells}
    for place in {place.column: place for place in cells if cells[place] or not any(cells.values())}.values():
        check(configs[place], words[place])  # one of every column
    names = {place: name_of(place, configs[place]) for place in cells}
    if config.cells and config.resume is None:
        for place in cells:
            same_images(Path(config.cells) / names[place], configs[place])
    run_dir = started(config, overrides)
    top = Path(config.cells) if config.cells else run_dir / "cells"
    folders = {place: top / names[place] for place in cells}
    also = config.task.get("also", ())
    todo = {place: configs[place] for place in cells if not finished(folders[place], cells[place], also)}
    jobs = side_by_side(config.jobs)
    console.print(
        f"grid={config.grid}: {len(cells)} cells, {len(cells) - len(todo)} of them finished, {jobs} at a time,"
        f" {run_dir}"
    )
    commands = {
        folders[place].name: command(folders[place], cells[place], words[place], configs[place])
        for place in sorted(todo, key=lambda place: -effort(configs[place]))
    }
    failed: dict[str, str] = {}
    if commands:
        work = {folders[place].name: (folders[place], configs[place]) for place in todo}
        with progress(work) as tick:
            failed = together(commands, run_dir / "logs", jobs, tick)
    fill(grid, folders, kind_of(config))
    write_text(run_dir / "table.md", markdown(grid))
    write_text(run_dir / "table.csv", csv_text(grid))
    figure(grid, run_dir / "figure.png")
    summary = {
        "task": "selftrain",
        "grid": config.grid,
        "data": grid.data,
        "cells": {folder.name: str(folder) for folder in folders.values()},
        "failed": failed,
        **provenance(config, overrides),
    }
    console.print(markdown(grid), markup=False)
    if failed:
        name, line = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(cells)} cells failed, first {name}: {line.removeprefix('sslzoo: ')}"
            f" (see {run_dir}/logs; resume={run_dir} tries again)"
        )
    write_summary(run_dir, summary)
    return summary


# Which cells


def inits(config: DictConfig) -> dict[str, str]:
    """What is compared, ``random`` first: as it was typed, and its name in the table.

    Raises:
        UserError: on an unknown grid, one init alone, or networks that differ.
    """
    if config.grid not in GRIDS:
        raise UserError(f"grid={config.grid} is none of {', '.join(GRIDS)}")
    if config.grid == "augment" and "augment" not in config:
        raise UserError("grid=augment compares s1 to s4, which images to classify do not have; take grid=fraction")
    if config.grid == "joint" and (config.trains != "detect" or not (config.task.joint and config.task.joint.data)):
        raise UserError(
            "grid=joint compares boxes alone with boxes and classes at once: name images with classes,"
            " task.joint.data=photos, and a detector"
        )
    for key in ("fractions", "augments", "seeds"):
        if not isinstance(config[key], ListConfig) or not len(config[key]) or len(set(config[key])) < len(config[key]):
            raise UserError(f"{key}={config[key]} is no list of different values; type {key}=[...]")
    typed = list(config.init) if isinstance(config.init, ListConfig) else [config.init]
    if typed == ["random"]:
        raise UserError(
            f"grid={config.grid} compares random with pre-training: set init= to imagenet or a backbone.safetensors,"
            " or to several, init=[A,B]"
        )
    named = {"random": "random"}
    wanted = Encoder(**plain(config.encoder)).config
    for init in typed:
        encoder = initial(OmegaConf.merge(config, {"init": init}))
        differing = [f"encoder.{key}={word(value)}" for key, value in encoder.config.items() if value != wanted[key]]
        if differing:
            raise UserError(
                f"init={init} is another network than init=random, which shows nothing; set {' '.join(differing)}"
            )
        method = encoder.metadata["method"] if init not in ("random", "imagenet") else init
        named[init] = told_apart(method, init, named.values())
    return named


def told_apart(method: str, init: str, taken: Collection[str]) -> str:
    """A name that is not taken: the method's, with as many of the file's folders as that needs."""
    folders = Path(init).parent.parts
    longer = ("/".join(folders[-count:]) for count in range(1, len(folders) + 1))
    return next(name for name in (method, *(f"{method} {each}" for each in longer), init) if name not in taken)


def layout(config: DictConfig, named: dict[str, str]) -> Grid:
    """The empty table: Table 3 of the paper, Table 2, Table 4, or Table 7."""
    usual = str(config.augment) if "augment" in config else ""  # images to classify have no s1 to s4
    labels = float(config.label_fraction)
    both = [Row(name, trains) for name in named.values() for trains in (False, True)]
    last = [*map(Row, named.values()), Row("random", True)]
    rows, columns = {
        "fraction": (both, [Column(percent(part), usual, float(part)) for part in config.fractions]),
        "joint": (both, [Column("boxes alone", usual, labels, joint=False), Column("jointly", usual, labels)]),
        "augment": (last, [Column(str(each).upper(), str(each), labels) for each in config.get("augments", ())]),
        "init": (last, [Column(usual.upper() or percent(labels), usual, labels)]),
    }[config.grid]
    joint = config.task.get("joint")
    other = config.get("teacher") is not None or (config.grid != "joint" and joint is not None and joint.data)
    return Grid(config.grid, str(config.data.name), rows, columns, kind_of(config).NAME, not other)


def percent(part: float) -> str:
    """``20%``, or ``0.50%`` of a small part."""
    return f"{part:.0%}" if part >= 0.01 else f"{part:.2%}"


def places(config: DictConfig, grid: Grid, named: dict[str, str]) -> dict[Place, bool]:
    """All cells of all seeds, and whether their students are wanted too."""
    students = {row.init for row in grid.rows if row.self_training}
    return {
        Place(init, name, column, seed): name in students
        for column in grid.columns
        for init, name in named.items()
        for seed in config.seeds
    }


def cell_words(place: Place, trains: bool, kept: Sequence[str]) -> list[str]:
    """What to type for a cell alone."""
    return [
        *kept,
        f"init={word(place.init)}",
        *([f"augment={place.column.augment}"] if place.column.augment else []),
        f"label_fraction={place.column.label_fraction}",
        f"seed={place.seed}",
        f"self_training={word(trains)}",
        *([] if place.column.joint else ["task.joint.data=null"]),
    ]


def name_of(place: Place, config: DictConfig) -> str:
    """A cell's folder, which only cells that compute the same share."""
    start = "".join(letter if letter.isalnum() else "_" for letter in place.named)
    column = [place.column.augment] if place.column.augment else []
    parts = (start, *column, f"{place.column.label_fraction:g}", f"seed{place.seed}", config_hash(config)[:6])
    return "_".join(parts)


def same_images(folder: Path, config: DictConfig) -> None:
    """Refuse, by UserError, a cell that another grid has left in ``folder`` with images from elsewhere."""
    if not (folder / "config.yaml").is_file():
        return
    stored, now = (keys_of(each) for each in (OmegaConf.load(folder / "config.yaml"), config))
    for key in ("data.root", "task.joint.root"):
        was, wanted = (each.get(key) and Path(each[key]).expanduser().absolute() for each in (stored, now))
        if was != wanted:
            raise UserError(
                f"{folder} was made with {key}={stored[key]}, and this grid has {key}={now[key]}: other images make"
                " other cells, so set cells= to another folder; where they have only moved, resume= the grid that made"
                f" it with {key}={now[key]}"
            )


# Running them


def command(folder: Path, trains: bool, words: Sequence[str], config: DictConfig) -> list[str]:
    """A cell from its start, or from where it stopped."""
    if (folder / "config.yaml").is_file():
        return [f"resume={word(str(folder))}", f"self_training={word(trains)}", *moved(folder / "config.yaml", config)]
    return [*words, f"run_dir={word(str(folder))}"]


def finished(folder: Path, trains: bool, also: Sequence[str] = ()) -> bool:
    """Whether a cell has all that is wanted of it, scores on ``also`` further held-out parts among it."""
    summary = told_by(folder)
    scored = set(summary.get("supervised", {}).get("also") or ())
    return bool(summary) and ("student" in summary or not trains) and scored >= set(also)


def told_by(folder: Path) -> dict:
    """A run's summary; empty where there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def parts_of(config: DictConfig) -> dict[str, int]:
    """A cell's parts and their work, in batches."""
    steps = steps_of(config)
    parts = {"teacher": steps}
    if config.self_training:
        turns = [f"student_{turn}" if turn > 1 else "student" for turn in range(1, config.iterations + 1)]
        parts |= dict.fromkeys(turns, 2 * steps) | {"control": 2 * steps}
    return parts


def effort(config: DictConfig) -> int:
    """All of a cell's work, in batches."""
    return sum(parts_of(config).values())


def done(folder: Path, config: DictConfig) -> float:
    """How much of it is done."""
    total = 0.0
    for part, batches in parts_of(config).items():
        place = folder / part
        if (place / "summary.json").is_file():
            total += batches
        elif (place / "metrics.csv").is_file() and (rows := read_rows(place / "metrics.csv")):
            steps = batches // 2 if part != "teacher" and part != "control" else batches
            total += batches * min(1.0, rows[-1]["step"] / max(1, steps))
    return total


@contextmanager
def progress(work: dict[str, tuple[Path, DictConfig]]) -> Iterator[Callable]:
    """A function to tell exit codes to, which shows how far the cells are and when they will be done."""
    total = sum(effort(config) for _, config in work.values())
    before, since, said = sum(done(*each) for each in work.values()), time.monotonic(), set()

    def left() -> tuple[float, str]:
        now = sum(done(*each) for each in work.values())
        rate = (now - before) / max(time.monotonic() - since, 1e-9)
        minutes = (total - now) / rate / 60 if rate else float("nan")
        return now, f"{minutes:.0f} min left" if rate else "time left unknown"

    columns = TextColumn("{task.fields[cells]}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task("", total=total, completed=before, cells=f"0 of {len(work)} cells", left="")

        def tick(codes: dict[str, int | None]) -> None:
            ended = {name: code for name, code in codes.items() if code is not None}
            new = ended.keys() - said
            if not new and not sys.stderr.isatty():
                return  # metrics of a hundred cells need not be read every second
            now, rest = left()
            bar.update(shown, completed=now, cells=f"{len(ended)} of {len(work)} cells", left=rest)
            for name in sorted(new):
                said.add(name)
                how = "finished" if ended[name] == 0 else f"failed with code {ended[name]}"
                console.print(f"{name} {how}; {len(ended)} of {len(work)} cells, {rest}", markup=False)

        yield tick


# What came out


def fill(grid: Grid, folders: dict[Place, Path], kind: Kind) -> None:
    """Put what the cells have left into ``grid``; a cell that failed may have a teacher all the same."""
    for place, folder in folders.items():
        whole, column = told_by(folder), place.column
        if teacher := told_by(folder / "teacher"):
            row = Row(place.named)
            grid.scores.setdefault((row, column), Cell()).add(place.seed, teacher[kind.PART_SCORE])
            grid.curves.setdefault((row, column), []).append(looks(folder / "teacher", teacher["steps"], kind))
        row = Row(place.named, self_training=True)
        if "student" in whole and row in grid.rows:
            grid.scores.setdefault((row, column), Cell()).add(place.seed, whole[kind.SCORE])
            grid.controls.setdefault((row, column), Cell()).add(place.seed, whole["control"][kind.SCORE])
            grid.runs.setdefault((row, column), []).append(whole)
            student = sorted(folder.glob("student*"), key=lambda path: (len(path.name), path.name))[-1]
            grid.curves.setdefault((row, column), []).append(looks(student, whole["student"]["steps"], kind))
            control = looks(folder / "control", whole["control"]["steps"], kind)
            grid.control_curves.setdefault((row, column), []).append(control)


def looks(run_dir: Path, steps: int, kind: Kind) -> list[tuple[int, int, float]]:
    """``(step, of all steps, score)`` along a run."""
    rows = read_rows(run_dir / "metrics.csv")
    return [(row["step"], steps, row[kind.PART_SCORE]) for row in rows if kind.PART_SCORE in row]
