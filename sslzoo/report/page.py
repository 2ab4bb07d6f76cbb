"""``report.html``: one file that shows which pretraining pays, and why to believe it; it opens without a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from sslzoo.monitor import Watch
from sslzoo.report import markup
from sslzoo.report.answer import answer
from sslzoo.report.embedding import Map
from sslzoo.report.found import Found, Run
from sslzoo.report.plots import CLASSES, ORANGE, panel, scatter
from sslzoo.report.protocol import Column
from sslzoo.report.table import LEGEND, Cell, Row, Table

HERE = Path(__file__).parent
SECTIONS = {
    "answer": "Answer",
    "table": "Table",
    "curves": "Curves",
    "neighbours": "Neighbours",
    "maps": "Maps",
    "attention": "Attention",
    "diagnostics": "Diagnostics",
    "provenance": "Provenance",
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
COSTS = (("epochs", "epochs", "{:.4g}"), ("seconds", "seconds", "{:.0f}"), ("images_per_second", "images/s", "{:.0f}"))
GALLERIES = 4  # that are shown at once


@dataclass(frozen=True)
class Made:
    """How the page came to be: the command, what it read, the day, the versions."""

    command: str
    runs: str
    when: str
    versions: dict[str, str]


def page(table: Table, found: Found, maps: Sequence[Map], notes: Sequence[str], made: Made) -> str:
    """The whole page.

    Args:
        table: rows and columns.
        found: what was read, and what could not be.
        maps: of the backbones that were opened, the best first.
        notes: why there are fewer than rows.
        made: where the page comes from.
    """
    bodies = {
        "answer": answer(table) + _missing(found),
        "table": _tables(table),
        "curves": _curves(table),
        "neighbours": _neighbours(table),
        "maps": _maps(maps, notes),
        "attention": _attention(maps),
        "diagnostics": _diagnostics(table, maps),
        "provenance": _provenance(found, made),
    }
    title = f"{markup.plural(len({row.method for row in table.methods}), 'method')} on {markup.listed(table.sets)}"
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in SECTIONS.items())
    sections = "\n".join(
        f'<section id="{key}">{"" if key == "answer" else f"<h2>{name}</h2>"}{bodies[key]}</section>'
        for key, name in SECTIONS.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<link rel="icon" href="data:,">\n'
        f"<title>sslzoo: {escape(title)}</title>\n<style>\n{(HERE / 'page.css').read_text()}</style>\n</head>\n<body>\n"
        f"<nav>{links}</nav>\n<header><h1>{escape(title)}</h1></header>\n{sections}\n"
        f"<script>\n{(HERE / 'page.js').read_text()}</script>\n</body>\n</html>\n"
    )


def _missing(found: Found) -> str:
    """What is not in the numbers."""
    unfinished = [f"{path}: not finished, it has no summary.json" for path in found.unfinished]
    return markup.note([*unfinished, *found.broken], "Not counted:")


# The table


def _tables(table: Table) -> str:
    parts = [markup.small(escape(LEGEND).replace("`~`", "<b>~</b>").replace("`?`", "<b>?</b>"))]
    for data in table.sets:
        rows, columns = table.on(data)
        costs = [cost for cost in COSTS if any(row.spent(cost[0]) is not None for row in rows)]
        heads = [markup.th("method", left=True)]
        heads += [markup.th(column.title, table.protocols[column]) for column in columns]
        heads += [markup.th(name) for _, name, _ in costs]
        heads += [markup.th("seeds"), markup.th("config", left=True), markup.th("versions", left=True)]
        lines = []
        for row in rows:
            cells = [f"<td>{escape(row.name)}</td>", *(_cell(table, row, column) for column in columns)]
            cells += [markup.number(row.spent(key), form) for key, _, form in costs]
            cells += [f"<td>{row.seeds}</td>", f'<td class="l"><code>{escape(row.hash)}</code></td>']
            cells.append(f'<td class="l"><small>{escape(row.versions)}</small></td>')
            lines.append(f"<tr{' class=base' if row.baseline else ''}>{''.join(cells)}</tr>")
        name = f"<h3>{escape(data)}</h3>" if len(table.sets) > 1 else ""
        parts.append(name + markup.table(heads, lines))
    return "".join(parts)


def _cell(table: Table, row: Row, column: Column) -> str:
    if column not in row.cells:
        return "<td></td>"
    cell, mark = row.cells[column], table.mark(row, column)
    best = " class=best" if cell is table.best.get(column) else ""
    spread = "-" if cell.sd is None else column.shown(cell.sd, cell.mean)
    seeds = f" ({cell.seeds})" if cell.seeds != row.seeds else ""
    return (
        f'<td data-v="{cell.mean}"{best}>{column.shown(cell.mean)} <small>± {spread}{seeds}</small>'
        f'<span class="mark">{mark}</span></td>'
    )


# Pictures


def _lines(row: Row, key: str, scale: float = 1.0) -> list[list[tuple[float, float]]]:
    """A line of ``(epoch, value)`` for each training run that logged ``key``."""
    lines = ([(epoch, scale * value) for epoch, value in _logged(run, key)] for run in row.pretrained)
    return [line for line in lines if line]


def _logged(run: Run, key: str) -> list[tuple[float, float]]:
    steps, epochs = run.summary.get("steps"), run.summary.get("epochs")
    per_step = epochs / steps if steps and epochs else 1.0
    return [(row["step"] * per_step, row[key]) for row in run.rows if key in row and "step" in row]


def _trained(table: Table) -> dict[str, list[Row]]:
    """Rows with training runs, by the set they were trained on."""
    by_set: dict[str, list[Row]] = {}
    for row in table.methods:
        if row.pretrained:
            by_set.setdefault(str(row.pretrained[0].summary.get("data", "-")), []).append(row)
    return by_set


def _own_knn(row: Row) -> tuple[Cell | None, Cell | None]:
    """The kNN accuracy that the training runs ended with, and that of their random start."""
    column = next((c for c in row.cells if (c.task, c.score) == ("pretrain", "knn_top1")), None)
    return (row.cells[column], row.before.get(column)) if column else (None, None)


def _seeds(row: Row) -> str:
    return f"seed {', '.join(str(run.seed) for run in row.pretrained)}"


def _curves(table: Table) -> str:
    parts = []
    for data, rows in _trained(table).items():
        starts = {row.name: 100 * start.mean for row in rows if (start := _own_knn(row)[1])}
        knn = {row.name: _lines(row, "knn_top1", 100) for row in rows}
        every = [point for lines in knn.values() for line in lines for point in line]
        ends = [y for _, y in every] + list(starts.values())
        losses = [point for row in rows for line in _lines(row, "loss") for point in line]
        x_range = (0.0, max((x for x, _ in (*every, *losses)), default=1.0))
        y_range = (min(ends), max(ends)) if ends else None
        cards = []
        for row in rows:
            others = [line for name, lines in knn.items() if name != row.name for line in lines]
            start = [(starts[row.name], ORANGE)] if row.name in starts else []
            plots = panel(knn[row.name], "kNN top-1, %", others, start, x_range, y_range)
            plots += panel(_lines(row, "loss"), "loss", x_range=x_range)
            cards.append(markup.card(row.name, f'<div class="pair">{plots}</div>', _seeds(row)))
        name = f"<h3>{escape(data)}</h3>" if len(_trained(table)) > 1 else ""
        parts.append(f'{name}<div class="grid two">{"".join(cards)}</div>')
    if not parts:
        return markup.small("No training run was read, only evaluations.")
    text = (
        "Blue: this method's seeds; gray: all others, on the same axes; dashed: its random start. The losses of"
        " different methods are different quantities, so each has its own axis."
    )
    return markup.small(text) + "".join(parts)


def _neighbours(table: Table) -> str:
    cards = []
    for row in table.methods:
        run = next((run for run in row.pretrained if (run.folder / "neighbours.png").is_file()), None)
        if run:
            alt = f"held-out images and their nearest training images, {row.name}"
            png = (run.folder / "neighbours.png").read_bytes()
            cards.append(markup.card(row.name, markup.image(png, alt, "shot"), f"seed {run.seed}"))
    if not cards:
        return markup.small("No run here has a neighbours.png: none has held-out images, or none was a training run.")
    text = markup.small("Held-out images and their nearest training images. Green frame: the same class; red: another.")
    return text + markup.grid(cards, GALLERIES)


def _maps(maps: Sequence[Map], notes: Sequence[str]) -> str:
    shown = [each for each in maps if len(each.points)]
    if not shown:
        return markup.note(notes or ["no training run whose backbone could be opened"])
    classes = {label: name for each in shown for label, name in each.classes.items()}
    keys = "".join(
        f'<span><i style="background:{CLASSES[label % len(CLASSES)]}"></i>{escape(name)}</span>'
        for label, name in sorted(classes.items())
    )
    cards = "".join(markup.card(each.name, scatter(each.points, each.labels, f"map of {each.name}")) for each in shown)
    text = (
        f"t-SNE of {len(shown[0].points)} held-out images, coloured by class. What is near here is near in feature"
        " space; sizes of clusters and distances between them mean nothing."
    )
    return (
        f'{markup.small(text)}<div class="keys">{keys}</div><div class="grid three">{cards}</div>{markup.note(notes)}'
    )


def _attention(maps: Sequence[Map]) -> str:
    cards = [
        markup.card(each.name, markup.image(each.attention, f"attention of {each.name}"))
        for each in maps
        if each.attention
    ]
    if not cards:
        return markup.small("No backbone that was opened is a Vision Transformer with a class token.")
    text = "Where the class token looks in the last block: the image, the mean over heads, then each head."
    return f'{markup.small(text)}<div class="grid two">{"".join(cards)}</div>'


# Diagnostics


def _diagnostics(table: Table, maps: Sequence[Map]) -> str:
    rows = [row for rows in _trained(table).values() for row in rows]
    if not rows:
        return markup.small("No training run was read, only evaluations.")
    names = ("spread", "rank", "kNN, %", "random start, %", "gain")
    heads = [markup.th("method", left=True), *(markup.th(name) for name in names), markup.th("finding", left=True)]
    lines = []
    for row in rows:
        knn, start = _own_knn(row)
        spread, rank = row.spent("feature_std"), row.spent("rank_me")
        after, before = (100 * cell.mean if cell else None for cell in (knn, start))
        gain = None if after is None or before is None else after - before
        numbers = ((spread, "{:.2f}"), (rank, "{:.1f}"), (after, "{:.1f}"), (before, "{:.1f}"), (gain, "{:+.1f}"))
        finding, kind = diagnosis(spread, knn, start)
        cells = [f"<td>{escape(row.name)}</td>", *(markup.number(value, form) for value, form in numbers)]
        lines.append(f'<tr>{"".join(cells)}<td class="l {kind}">{finding}</td></tr>')
    x_range = (0.0, max((x for row in rows for line in _lines(row, "rank_me") for x, _ in line), default=1.0))
    spectra = {each.name: [(i + 1.0, float(sigma)) for i, sigma in enumerate(each.spectrum)] for each in maps}
    widest = float(max((len(line) for line in spectra.values()), default=1))
    cards = []
    for row in rows:
        ranks = [line for other in rows if other is not row for line in _lines(other, "rank_me")]
        size = {"width": 190, "height": 130} if spectra else {}
        plots = panel(_lines(row, "feature_std"), "spread", x_range=x_range, y_range=(0.0, 1.0), **size)
        plots += panel(_lines(row, "rank_me"), "rank", ranks, x_range=x_range, **size)
        if row.name in spectra:
            others = [line for name, line in spectra.items() if name != row.name]
            ends = {"x_range": (1.0, widest), "y_range": (1e-4, 1.0), "x_name": "dimension"}
            plots += panel([spectra[row.name]], "spectrum", others, log=True, **ends, **size)
        cards.append(markup.card(row.name, f'<div class="{"trio" if spectra else "pair"}">{plots}</div>', _seeds(row)))
    text = (
        "Spread: 1 for features spread evenly over the sphere, 0 where all are one point. Rank: RankMe, how many"
        " dimensions are in use. Spectrum: singular values of the centred features of held-out images, as shares of the"
        " largest; one that drops at once has collapsed to few dimensions. Gray: the others."
    )
    return f'{markup.small(text)}{markup.table(heads, lines)}<div class="grid two">{"".join(cards)}</div>'


def diagnosis(spread: float | None, knn: Cell | None, start: Cell | None) -> tuple[str, str]:
    """What spread and accuracy say of a method, and whether that is good or bad."""
    if spread is not None and spread < Watch.COLLAPSED:
        return "collapsed", "bad"
    if knn is None or start is None:
        return "not collapsed; without labels no more can be told", ""
    if knn.mean <= start.mean:
        return "no better than its random start", "bad"
    if knn.seeds == 1:
        return "better than its random start, in one seed", ""
    if start.against(knn) == "~":
        return "within two standard errors of its random start", "bad"
    return "learned", "good"


# Where it comes from


def _provenance(found: Found, made: Made) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in made.versions.items())
    heads = [markup.th(name, left=True) for name in ("run", "task", "method", "seed", "config", "command", "versions")]
    lines = []
    for run in found.runs:
        numbers = ", ".join(f"{name} {number}" for name, number in dict(run.summary.get("versions") or {}).items())
        cells = [f'<td class="l">{escape(str(cell))}</td>' for cell in (run.folder, run.task, run.method, run.seed)]
        cells.append(f'<td class="l"><code>{escape(str(run.summary.get("config_hash", "-")))}</code></td>')
        cells.append(f'<td class="l long"><code>{escape(str(run.summary.get("command", "-")))}</code></td>')
        cells.append(f'<td class="l wrap"><small>{escape(numbers)}</small></td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    count = markup.plural(len(found.runs), "run")
    text = f"{count}. A config hash here includes the seed, one in the table above does not."
    return (
        markup.small(f"Made {escape(made.when)} from {escape(made.runs)} with {escape(versions)} by")
        + f"<p><code>{escape(made.command)}</code></p>{markup.small(text)}{markup.table(heads, lines)}"
    )
