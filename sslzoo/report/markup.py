"""Pieces of HTML that the sections of a page are made of."""

import base64
from collections.abc import Iterable, Sequence
from html import escape


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(count: int, word: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {word}" + ("" if count == 1 else "s")


def small(text: str) -> str:
    """A paragraph of small print, of HTML."""
    return f'<p class="small">{text}</p>'


def note(lines: Iterable[str], head: str = "") -> str:
    """A box with a list of lines of text; nothing where there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="note">{head}<ul>{items}</ul></div>' if items else ""


def card(name: str, inside: str, small: str = "") -> str:
    """A box with a heading, and HTML in it."""
    aside = f" <span>{escape(small)}</span>" if small else ""
    return f'<div class="card"><h3>{escape(name)}{aside}</h3>{inside}</div>'


def grid(cards: Sequence[str], shown: int) -> str:
    """Two columns; what is more than ``shown`` waits behind a line."""
    first, more = "".join(cards[:shown]), "".join(cards[shown:])
    rest = f'<details><summary>{len(cards) - shown} more</summary><div class="grid two">{more}</div></details>'
    return (f'<div class="grid two">{first}</div>' if first else "") + (rest if more else "")


def image(png: bytes, alt: str, kind: str = "") -> str:
    """A picture that stands in the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img class="{kind}" loading="lazy" alt="{escape(alt)}" src="{source}">'


def th(name: str, small: str = "", left: bool = False) -> str:
    """A head of a column, with small print below; ``left`` for words."""
    under = f"<small>{escape(small)}</small>" if small else ""
    return f"<th{' class=l' if left else ''}><span>{escape(name)}</span>{under}</th>"


def table(heads: Sequence[str], lines: Sequence[str]) -> str:
    """Of heads and lines that are HTML already."""
    head, body = f"<thead><tr>{''.join(heads)}</tr></thead>", f"<tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table>{head}{body}</table></div>'


def number(value: float | None, form: str) -> str:
    """A cell by whose value its column can be sorted."""
    return "<td></td>" if value is None else f'<td data-v="{value}">{form.format(value)}</td>'
