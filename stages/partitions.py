"""Partitions of the lists by date: a list is of the day that its name says, such as ``2026-11-08/urls.parquet``."""

from __future__ import annotations

import datetime
import re

# 2026-11-08, date=2026-11-08, 2026/11/08, year=2026/month=11/day=08; digits on either side make it something else.
_DATES = (
    re.compile(r"(?<!\d)(\d{4})([-/])(\d{2})\2(\d{2})(?!\d)"),
    re.compile(r"year=(\d{4})(/)month=(\d{1,2})/day=(\d{1,2})(?!\d)"),
)


def date_of(name: str) -> datetime.date | None:
    """Return the first date in a list's name; None if it has none, which counts as older than all."""
    found = sorted((match for pattern in _DATES for match in pattern.finditer(name)), key=lambda match: match.start())
    for match in found:
        year, _, month, day = match.groups()
        try:
            return datetime.date(int(year), int(month), int(day))
        except ValueError:
            continue  # digits that are no date, such as 1234-56-78
    return None


def check_date(text: str, place: str) -> None:
    """Refuse what is not written ``YYYY-MM-DD``; texts of this form compare as the days do.

    Raises:
        ValueError: names ``place``.
    """
    try:
        is_date = datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        is_date = False
    if not is_date:
        raise ValueError(f"{place}: '{text}' is not a date; write for example 2026-11-08")


def is_within(name: str, since: str | None, until: str | None) -> bool:
    """Tell whether a list belongs to a range of days, both ends included; None: no bound."""
    found = date_of(name)
    if found is None:
        return since is None
    day = found.isoformat()
    return (since is None or since <= day) and (until is None or day <= until)
