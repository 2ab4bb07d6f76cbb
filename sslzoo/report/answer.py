"""The answer at the top of the page: which method leads, in a sentence and in figures."""

from collections.abc import Sequence
from html import escape

from sslzoo.report import markup
from sslzoo.report.plots import ORANGE, Dot, dots
from sslzoo.report.protocol import Column
from sslzoo.report.table import Row, Table

PLOTS = 6  # that are shown at once


def answer(table: Table) -> str:
    """Each set: the sentence, and every column as a figure."""
    parts = []
    for data in table.sets:
        rows, columns = table.on(data)
        parts.append(f"<h3>{escape(data)}</h3>" if len(table.sets) > 1 else "")
        parts.append(f'<p class="answer">{sentence(table, data)}</p>')
        first = {(column.task, column.settings): column for column in reversed(columns)}  # top-1, not top-5 as well
        lead, *more = [column for column in columns if column in first.values()]
        parts.append(f'<div class="lead">{dot_plot(table, rows, lead, 940)}</div>{markup.small(_key(table, data))}')
        plots = [dot_plot(table, rows, column, 540) for column in more]
        parts.append(markup.grid(plots, PLOTS))
    return "".join(parts)


def sentence(table: Table, data: str) -> str:
    """The answer for one set in words (HTML), from the column that compares most methods."""
    rows, columns = table.on(data)
    column = columns[0]
    if column not in table.best:
        return "No trained method was measured here."
    methods = [row for row in rows if not row.baseline and column in row.cells]
    best = next(row for row in methods if row.cells[column] is table.best[column])
    cell = best.cells[column]
    spread = "" if cell.sd is None else f" ± {column.shown(cell.sd, cell.mean)}"
    text = f"<b>{escape(best.name)}</b> {'leads' if len(methods) > 1 else 'has'}: {escape(column.name)}"
    text += f" {column.shown(cell.mean)}{spread} {column.unit}".rstrip() + f" ({markup.plural(cell.seeds, 'seed')})"
    bases = [(best.before.get(column), "its random start")]
    bases += [(row.cells.get(column), row.name) for row in rows if row.baseline and row.method == "raw pixels"]
    if column.unit:
        gains = [f"{column.scale * (cell.mean - base.mean):+.1f} over {escape(name)}" for base, name in bases if base]
        text += f", {markup.listed(gains)}" if gains else ""
    others = [row for row in methods if row is not best]
    near = [row.name for row in others if table.mark(row, column) == "~"]
    unknown = sum(table.mark(row, column) == "?" for row in others)
    text += "."
    if near:
        text += f" Within two standard errors of it: {escape(markup.listed(near))}."
    if unknown and unknown == len(others):
        text += " One seed does not tell a method from luck: run more, <code>-m seed=0,1,2</code>."
    elif unknown:
        text += f" {markup.plural(unknown, 'other')} of one seed cannot be told apart from luck."
    elif others and not near:
        text += " All others are more than two standard errors behind."
    return text


def dot_plot(table: Table, rows: Sequence[Row], column: Column, width: int = 760) -> str:
    """One column as a figure (HTML): methods from the best to the worst, their random starts, the baselines."""
    rows = [row for row in rows if column in row.cells]
    rows.sort(key=lambda row: row.cells[column].mean * (1 if column.lower else -1))
    methods = [row for row in rows if not row.baseline]
    begun = any(column in row.before for row in methods)
    lines = {
        row.name: column.scale * row.cells[column].mean
        for row in rows
        if row.baseline and not (begun and row.method == "random init")
    }
    drawing = dots(
        [_dot(table, row, column) for row in methods], f"{column.name} on {column.data}", lines, column.unit, width
    )
    caption = f"<b>{escape(column.title)}</b>, {escape(table.protocols[column])}".removesuffix(", ")
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _key(table: Table, data: str) -> str:
    """What the marks in the plots of one set mean."""
    rows, columns = table.on(data)
    cells = [row.cells[column] for row in rows if not row.baseline for column in columns if column in row.cells]
    told = []
    if any(row.before for row in rows):
        told.append(f'<span style="color:{ORANGE}">○</span> the same encoder at its random start.')
    if any(cell.sd is not None for cell in cells):
        told.append("Bars: ± one standard deviation over seeds, the small dots.")
    if any(cell.interval for cell in cells):
        told.append("Bars of one seed: its 95 % interval over held-out images.")
    if any(cell.against(table.best[c]) == "~" for c in table.best for row in rows if (cell := row.cells.get(c))):
        told.append("~: within two standard errors of the best.")
    return " ".join(told)


def _dot(table: Table, row: Row, column: Column) -> Dot:
    cell, before, scale = row.cells[column], row.before.get(column), column.scale
    bar = cell.interval if cell.sd is None else (cell.mean - cell.sd, cell.mean + cell.sd)
    spread = "" if cell.sd is None else f" ± {column.shown(cell.sd, cell.mean)}"
    near = " ~" if table.mark(row, column) == "~" else ""
    return Dot(
        row.name,
        f"{column.shown(cell.mean)}{spread}{near}",
        scale * cell.mean,
        (scale * bar[0], scale * bar[1]) if bar else None,
        [scale * value for value in cell.values],
        scale * before.mean if before else None,
        cell is table.best.get(column),
    )
