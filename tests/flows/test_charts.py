"""Charts: round ticks, true positions, and text that cannot break out of the drawing."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from flows.charts import (
    Axis,
    Interval,
    Series,
    histogram,
    interval_chart,
    line_chart,
    linear_ticks,
    log_ticks,
    short_number,
    smooth,
    thin,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0.0, 0.5, 1.0]),
        (0.03, 0.11, [0.04, 0.06, 0.08, 0.1]),
        (-7, 93, [0.0, 50.0]),
        (0, 4000, [0.0, 1000.0, 2000.0, 3000.0, 4000.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert linear_ticks(low, high, 4) == ticks


def test_log_ticks() -> None:
    assert log_ticks(0.009, 110) == [0.01, 0.1, 1.0, 10.0, 100.0]
    assert log_ticks(0.2, 4) == pytest.approx([0.3, 1.0, 3.0])
    assert log_ticks(1.3, 4.5) == [2.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1500, "1.5k"), (3e6, "3M"), (2.3e9, "2.3B"), (0.00002, "2e-5"), (-0.5, "-0.5")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_axes_map_ends_to_ends_and_hold_what_is_outside() -> None:
    axis = Axis(10, 1000, 0, 100, log=True)
    assert [axis.at(v) for v in (10, 100, 1000, 1e9, 1)] == pytest.approx([0, 50, 100, 100, 0])
    assert Axis(0, 4, 100, 0).at(1) == 75


def test_smoothing_keeps_lines_straight_and_averages_noise() -> None:
    line = [(float(i), 2.0 * i + 1) for i in range(20)]
    assert [y for _, y in smooth(line, 5)[:-2]] == pytest.approx([y for _, y in line[:-2]])
    noisy = [(float(i), float(i % 2)) for i in range(100)]
    assert [y for _, y in smooth(noisy, 21)][30:] == pytest.approx([0.5] * 70, abs=0.05)
    assert smooth([], 5) == []


def test_thinning_keeps_the_mean() -> None:
    points = [(float(i), float(i)) for i in range(1003)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert thinned[0][0] == pytest.approx(4.5, abs=1) and thin(points[:50], 100) == points[:50]


def drawn(svg: str) -> ET.Element:
    """Parse a drawing as strict XML."""
    assert "NaN" not in svg and "nan" not in svg
    return ET.fromstring(svg)


@pytest.mark.parametrize("log_y", [False, True])
def test_lines_are_drawn_inside_the_frame(log_y: bool) -> None:
    points = [(float(i), 2.0**-i) for i in range(20)]
    chart = line_chart(
        [Series(name="a", points=points)], label='"loss" <of> &', x_label="<step>", log_y=log_y, rule=(5.0, "k < 5")
    )
    root = drawn(chart)
    assert root.attrib["aria-label"] == '"loss" <of> &'
    line = root.find("polyline")
    assert line is not None
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(places) == 20
    assert all(0 <= x <= 440 and 0 <= y <= 210 for x, y in places)
    assert [y for _, y in places] == sorted(y for _, y in places)


@pytest.mark.parametrize("points", [[(1.0, 0.0)], [(1.0, 3.0), (2.0, 3.0)]])
def test_degenerate_lines_are_drawn_too(points: list[tuple[float, float]]) -> None:
    drawn(line_chart([Series(name="a", points=points)], label="x", x_label="x"))


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="chart 'x' has no points"):
        line_chart([Series(name="a", points=[])], label="x", x_label="x")


def test_bars_have_the_heights_of_their_counts() -> None:
    root = drawn(histogram([0, 1, 2, 3], [("all", [4, 0, 2]), ("kept", [1, 0, 2])], label="x", x_label="x"))
    bars = [(bar.attrib["class"], float(bar.attrib["height"])) for bar in root.iter("rect")]
    assert [kind for kind, _ in bars] == ["bar faint", "bar faint", "bar strong", "bar strong"]
    assert bars[0][1] == pytest.approx(2 * bars[1][1], abs=0.2) == pytest.approx(4 * bars[2][1], abs=0.4)
    drawn(histogram([0, 1], [("all", [0])], label="x", x_label="x"))


def test_intervals() -> None:
    rows = [("shape", [Interval(value=0.5, low=0.25, high=0.75, style="strong", name="generated")]), ("none", [])]
    root = drawn(interval_chart(rows, label="x"))
    circle = root.find(".//circle")
    assert circle is not None
    line = root.find(".//g/line")
    assert line is not None
    middle = (float(line.attrib["x1"]) + float(line.attrib["x2"])) / 2
    assert float(circle.attrib["cx"]) == pytest.approx(middle, abs=0.1)
