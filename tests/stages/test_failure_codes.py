"""The table of reason codes: complete, and the same in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.failure_codes import FAILURE_CODES, FetchError, failure_code, is_transient, remedy_of
from stages.robots import refusal_without_rules

TOP = Path(__file__).parents[2]
DOCS = TOP / "docs" / "data.md"


def documented() -> list[tuple[str, ...]]:
    """Read the table of the section `Why a row has no image`."""
    section = DOCS.read_text().split("## Why a row has no image", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in row) for row in rows]


def test_the_docs_hold_the_same_table() -> None:
    def yes(value: bool) -> str:
        return "yes" if value else "no"

    assert documented() == [
        (f"`{item.code}`", item.meaning, yes(item.can_pass), yes(item.retried), item.remedy) for item in FAILURE_CODES
    ]


def test_codes_are_distinct_and_only_what_can_pass_is_retried() -> None:
    codes = [item.code for item in FAILURE_CODES]
    assert len(set(codes)) == len(codes)
    assert all(item.can_pass for item in FAILURE_CODES if item.retried or item.blames_host)


def test_every_code_that_the_sources_name_is_in_the_table() -> None:
    named = set()
    for name in ("connections", "fetch", "politeness", "resolver", "row_fetcher", "img2dataset_unit"):
        text = (TOP / "stages" / f"{name}.py").read_text()
        named |= set(re.findall(r'(?:FetchError|_end|_give_up|Ended|UnitRow)\((?:\w+, )?"(\w+)"', text))
    assert {"dns", "blocked_address", "redirects", "host_down", "host_busy", "robots_txt", "hash_mismatch"} <= named
    for reason in named:
        assert failure_code(reason).code == reason


@pytest.mark.parametrize(
    ("reason", "code", "can_pass"),
    [
        ("http_404", "http_404", False),
        ("http_403", "http_4xx", False),
        ("http_429", "http_429", True),
        ("http_500", "http_5xx", True),
        ("http_522", "http_5xx", True),
        ("http_304", "http_3xx", False),
        ("http_204", "http_2xx", False),
        ("http_999", "http_xxx", False),
        ("http_103", "http_xxx", False),
        ("host_down", "host_down", True),
        ("decode", "decode", False),
    ],
)
def test_statuses_share_the_line_of_their_hundred(reason: str, code: str, can_pass: bool) -> None:
    assert failure_code(reason).code == code
    assert is_transient(reason) is can_pass


def test_unknown_reasons_are_a_mistake() -> None:
    with pytest.raises(KeyError):
        failure_code("bad_luck")


def test_a_failure_may_be_known_to_last() -> None:
    assert FetchError("dns").retried and not FetchError("dns", lasting=True).retried
    assert not FetchError("host_down").retried and is_transient("host_down")


def test_the_remedy_is_that_of_the_most_frequent_reason() -> None:
    assert "download.max_pixels" in remedy_of({"too_many_pixels": 5, "http_503": 2})
    assert "run again later" in remedy_of({"too_many_pixels": 5, "http_503": 7})
    assert remedy_of({})


def test_every_reason_decides_about_robots_txt() -> None:
    for item in FAILURE_CODES:
        refusal = refusal_without_rules(item.code)
        assert refusal is None or failure_code(refusal)
