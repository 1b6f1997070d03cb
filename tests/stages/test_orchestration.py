"""The section `prefect` of the config: its stages are those of the graph, its mistakes are refused at the door."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from stages.config import load_config
from stages.errors import ConfigError
from stages.graph import STAGE_NAMES
from stages.orchestration import PrefectConfig, StageName


def test_the_stages_are_those_of_the_graph() -> None:
    assert set(typing.get_args(StageName)) == set(STAGE_NAMES)


def test_delays_double() -> None:
    assert PrefectConfig(stage_retries=4, retry_delay_s=0.5).retry_delays_s == [0.5, 1.0, 2.0, 4.0]
    assert PrefectConfig(stage_retries=0).retry_delays_s == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage_retries=51", "prefect.stage_retries: 51 is not between 0 and 50"),
        ("retry_jitter=-1", "prefect.retry_jitter: -1.0 is negative"),
        ("stage_timeouts_s={decoder: 0}", "prefect.stage_timeouts_s.decoder: 0.0 leaves no time"),
        ("stage_timeouts_s={decodr: 5}", "prefect.stage_timeouts_s"),
        ("{cron: 0 3 * * 1, interval_s: 5}", "prefect.interval_s: cannot be joined with cron"),
        ("timezone=Mars/North", "prefect.timezone: 'Mars/North' is unknown"),
        ("notify=[https://hooks.example/secret]", "is no block of Prefect; write kind/name"),
        ("concurrency=0", "prefect.concurrency: 0 is below 1"),
        ("{watch_lists_s: 60, when_busy: skip}", "prefect.when_busy: skip would lose lists"),
    ],
)
def test_mistakes_are_refused(override: str, expected: str) -> None:
    key = "prefect" if override.startswith("{") else "prefect." + override.partition("=")[0]
    value = override if override.startswith("{") else override.partition("=")[2]
    with pytest.raises(ConfigError) as refused:
        load_config("configs/quickstart.yaml", [f"{key}={value}"])
    assert expected in str(refused.value)


def test_nothing_of_it_changes_a_fingerprint() -> None:
    from stages.base import identity_of

    config: Any = load_config("configs/quickstart.yaml", ["prefect.cron=0 3 * * 1", "prefect.stage_retries=7"])
    assert "prefect" not in identity_of(config, ("shard", "stage"))
