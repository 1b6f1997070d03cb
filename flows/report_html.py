"""Small pieces of HTML that the report is made of. Arguments named ``html`` are markup; all others are escaped here."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape


def tile(label: str, value: str, detail: str = "") -> str:
    """Return a headline number."""
    return f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(detail)}</small></div>'


def tiles(html: Sequence[str]) -> str:
    """Lay tiles out in a row."""
    return f'<div class="tiles">{"".join(html)}</div>' if html else ""


def card(title: str, html: str) -> str:
    """Frame a chart or a small table."""
    return f'<div class="card"><h3>{escape(title)}</h3>{html}</div>'


def cards(html: Sequence[str], *, wide: bool = False) -> str:
    """Lay cards out side by side where there is room."""
    return f'<div class="cards{" two" if wide else ""}">{"".join(html)}</div>'


def note(text: str) -> str:
    """Return a remark that must not be overlooked."""
    return f'<p class="note">{escape(text)}</p>'


def link_list(anchors: Sequence[tuple[str, str]]) -> str:
    """Return links to the sections of the page, given as anchor and text."""
    links = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in anchors)
    return f"<nav>{links}</nav>"


def table(header: Sequence[str], html: Sequence[Sequence[str]]) -> str:
    """Return a table; columns whose header starts with ``#`` are numbers, set to the right."""
    numeric = [name.startswith("#") for name in header]
    head = "".join(f'<th scope="col"{_right(name[0:1] == "#")}>{escape(name.lstrip("#"))}</th>' for name in header)
    rows = "".join(
        "<tr>"
        + "".join(f"<td{_right(bool(numeric) and numeric[i])}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in html
    )
    thead = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f'<div class="scroll"><table>{thead}<tbody>{rows}</tbody></table></div>'


def _right(right: bool) -> str:
    return ' class="num"' if right else ""


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Return the legend of a chart: style and text of each entry; an empty style is a remark."""
    swatch = {style: f'<i class="{style}"></i>' if style else "" for style, _ in entries}
    return '<div class="legend">' + "".join(f"<span>{swatch[s]}{escape(text)}</span>" for s, text in entries) + "</div>"


def soft(text: str) -> str:
    """Return a paragraph of explanation."""
    return f'<p class="soft">{escape(text)}</p>'


def bar(fraction: float) -> str:
    """Return a bar, 0 to 1."""
    return f'<span class="track"><i style="width:{100 * min(max(fraction, 0.0), 1.0):.1f}%"></i></span>'


def data_uri(media_type: str, content: bytes) -> str:
    """Return a URI that is its own content, for a page that needs nothing else."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def number(value: float | str) -> str:
    """Write a number for a table: whole ones with separators, others with four digits."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def with_error(value: float, error: float) -> str:
    """Write a value to the second digit of its standard error, as in ``0.436 ± 0.011``."""
    if not error > 0:
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def duration(seconds: float) -> str:
    """Write seconds for people: ``8.2 s``, ``3 min 20 s``, ``5 h 02 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
