"""How Prefect runs the pipeline: tries and time limits of stages, and what ``unclip deploy`` registers.

Nothing here changes what is produced. ``flows/`` is the only reader: stages do not know Prefect.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stages.base import setting

# Written out so that a type checker, the config's door and Prefect's form know them; a test holds it to the graph.
StageName = Literal[
    "source",
    "download",
    "filter",
    "clip",
    "embed",
    "curate",
    "ledger",
    "pca",
    "prior",
    "decoder",
    "upsampler_256",
    "upsampler_1024",
    "generate",
    "evaluate",
]
RunEnd = Literal["completed", "failed", "crashed", "timed_out", "cancelled", "refused"]  # refused: by the gate

MAX_RETRIES = 50  # Prefect keeps no more delays than that
_BLOCK = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")


@dataclass(frozen=True, kw_only=True)
class PrefectConfig:
    """How Prefect runs the pipeline, and what `unclip deploy` registers with its server."""

    stage_retries: int = setting(1, "further tries of a stage that lost its store or cluster", affects="nothing")
    retry_delay_s: float = setting(5.0, "seconds before a stage is tried again; doubles each time", affects="nothing")
    retry_jitter: float = setting(0.3, "share by which a delay is varied at random; 0: not at all", affects="nothing")
    stage_timeouts_s: Mapping[StageName, float] = setting(
        factory=dict, help="stage -> seconds that one try of its shards may take", affects="nothing"
    )
    deployment: str | None = setting(None, "name of the deployment; null: that of the config file", affects="nothing")
    pool: str = setting("unclip", "work pool of the deployment, made if there is none", affects="nothing")
    pool_kind: Literal["process", "kubernetes"] = setting(
        "process", "what a new pool starts: processes beside its worker, or Kubernetes jobs", affects="nothing"
    )
    pool_limit: int | None = setting(None, "runs at a time in a new pool, of all deployments", affects="nothing")
    job_variables: Mapping[str, Any] = setting(
        factory=dict, help="of the pool's base job template, over what `unclip deploy` sets", affects="nothing"
    )
    cron: str | None = setting(None, "when to run, e.g. `0 3 * * 1`; null: not by the clock", affects="nothing")
    timezone: str = setting("UTC", "of `cron`, e.g. Europe/Berlin", affects="nothing")
    interval_s: float | None = setting(None, "seconds from run to run; null: none", affects="nothing")
    watch_lists_s: float | None = setting(
        None, "seconds from look to look at the URL lists; new content starts a run; null: no look", affects="nothing"
    )
    concurrency: int = setting(1, "runs of the deployment at a time", affects="nothing")
    when_busy: Literal["queue", "skip"] = setting("queue", "what a run beyond that does", affects="nothing")
    notify: tuple[str, ...] = setting(
        (), "Prefect blocks told how runs end, as kind/name: webhook/ops, slack-webhook/team", affects="nothing"
    )
    notify_on: tuple[RunEnd, ...] = setting(
        ("failed", "crashed", "timed_out", "refused"), "the ends they are told about", affects="nothing"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.stage_retries <= MAX_RETRIES:
            raise ValueError(f"stage_retries: {self.stage_retries} is not between 0 and {MAX_RETRIES}")
        for name in ("retry_delay_s", "retry_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        for stage, seconds in self.stage_timeouts_s.items():
            if seconds <= 0:
                raise ValueError(f"stage_timeouts_s.{stage}: {seconds} leaves no time; leave {stage} out for no limit")
        for name in ("interval_s", "watch_lists_s", "concurrency", "pool_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is below 1")
        if self.cron is not None and self.interval_s is not None:
            raise ValueError("interval_s: cannot be joined with cron; set one of them to null")
        if self.watch_lists_s is not None and self.when_busy == "skip":
            raise ValueError(
                "when_busy: skip would lose lists that appear while a run is at work, for which watch_lists_s starts "
                "one; write queue, or set watch_lists_s to null"
            )
        if self.timezone not in zoneinfo.available_timezones():
            raise ValueError(f"timezone: '{self.timezone}' is unknown; write a name such as UTC or Europe/Berlin")
        for block in self.notify:
            if not _BLOCK.fullmatch(block):
                raise ValueError(
                    f"notify: '{block}' is no block of Prefect; write kind/name, such as webhook/ops, and keep the "
                    "address in the block"
                )

    @property
    def retry_delays_s(self) -> list[float]:
        """Seconds before every further try of a stage."""
        return [self.retry_delay_s * 2**number for number in range(self.stage_retries)]
