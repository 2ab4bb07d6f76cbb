"""Many runs in one table and one page: which pretraining pays."""

import json
import logging
import shlex
from collections.abc import Sequence
from datetime import datetime

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table as Grid

from sslzoo.checkpoints.backbone import load_backbone
from sslzoo.checkpoints.files import write_text
from sslzoo.data.module import Images
from sslzoo.errors import UserError
from sslzoo.report.embedding import Map, look
from sslzoo.report.found import Run, read
from sslzoo.report.page import Made, page
from sslzoo.report.progress import console
from sslzoo.report.table import LEGEND, Table, csv_text, markdown, said, tabulate
from sslzoo.tasks.runs import claim_run_dir, images, provenance, write_summary

log = logging.getLogger(__name__)


def run(config: DictConfig, overrides: Sequence[str]) -> dict:
    """Read the runs below ``config.runs``; leave ``table.md``, ``table.csv`` and ``report.html``."""
    check(config)
    found = read(config.runs)
    for line in found.broken:
        log.warning("%s; left out", line)
    table = tabulate(found.runs)
    if not table.columns:
        raise UserError(f"runs={config.runs} has {len(found.runs)} summaries but no score in them; nothing to compare")
    run_dir = claim_run_dir(config, "compare")
    maps, notes = drawn(table, config) if config.task.maps else ([], ["task.maps=false: no backbone was opened"])
    origin = provenance(config, overrides)
    command = shlex.join(["python", "-m", "sslzoo", *overrides])
    made = Made(command, str(config.runs), datetime.now().strftime("%Y-%m-%d %H:%M"), origin["versions"])
    write_text(run_dir / "table.md", markdown(table))
    write_text(run_dir / "table.csv", csv_text(table))
    write_text(run_dir / "report.html", page(table, found, maps, notes, made))
    summary = {
        "task": "compare",
        "method": "-",
        "data": ", ".join(table.sets),
        "backbone": None,
        "runs": [str(run.folder) for run in found.runs],
        "best": [
            {"data": column.data, "task": column.task, "score": column.score, "method": row.name, "mean": cell.mean}
            for column, cell in table.best.items()
            for row in table.methods
            if row.cells.get(column) is cell
        ],
        "broken": found.broken,
        "unfinished": [str(folder) for folder in found.unfinished],
        "notes": notes,
        **origin,
    }
    write_summary(run_dir, summary)
    report(table)
    console.print(f"{len(found.runs)} runs -> {run_dir}/report.html, table.md, table.csv")
    return summary


def check(config: DictConfig) -> None:
    """Refuse options that make no page."""
    for key, least in (("max_maps", 2), ("images", 5)):
        if not isinstance(config.task[key], int) or config.task[key] < least:
            raise UserError(f"task.{key}={config.task[key]} is no whole number from {least} on; try task.maps=false")
    if not isinstance(config.task.maps, bool):
        raise UserError(f"task.maps={config.task.maps} is neither true nor false")


def drawn(table: Table, config: DictConfig) -> tuple[list[Map], list[str]]:
    """Spectra of all rows' backbones and maps of the best, after that of a random start; a line on what cannot be."""
    options = config.task
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    sets: dict[str, Images] = {}
    maps: list[Map] = []
    notes: list[str] = []
    for row in (row for row in table.methods if row.pretrained):
        run = row.pretrained[0]
        try:
            encoder, data = load_backbone(run.backbone), data_of(run, sets)
            if not maps:
                torch.manual_seed(config.seed)
                start = type(encoder)(**encoder.config)
                maps.append(look("random init", start.to("cuda" if on_gpu else "cpu"), data, options.images))
            mapped = len(maps) < options.max_maps
            maps.append(look(row.name, encoder.to("cuda" if on_gpu else "cpu"), data, options.images, mapped))
        except UserError as error:
            notes.append(f"no map of {row.name}: {error}")
            log.warning(notes[-1])
    if len(maps) > options.max_maps:
        notes.append(f"a random start and the best {options.max_maps - 1}; task.max_maps={len(maps)} maps all")
    return maps, notes


def data_of(run: Run, sets: dict[str, Images]) -> Images:
    """The images a run was trained on, loaded once for all runs of the same images."""
    if not run.config:
        raise UserError(f"{run.folder} has no config.yaml, which says what its images were")
    config = OmegaConf.load(run.folder / "config.yaml")
    key = json.dumps([OmegaConf.to_container(config.data), config.image_size], sort_keys=True)
    if key not in sets:
        sets[key] = images(config)
    return sets[key]


def report(table: Table) -> None:
    """The table on the console, a set at a time."""
    for data in table.sets:
        rows, columns = table.on(data)
        grid = Grid(title=data)
        grid.add_column("")
        for column in columns:
            grid.add_column(f"{column.name}\n{table.protocols[column]}", justify="right")
        for row in rows:
            cells = [said(c, row.cells[c], table.mark(row, c)) if c in row.cells else "" for c in columns]
            grid.add_row(row.name, *cells)
        console.print(grid)
    console.print(LEGEND.replace("`", ""))
