"""Two small real stages for testing the contract: numbers, and their squares."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.base import Progress, Resources, Result, Shard, Stage, setting
from stages.errors import InputError, ShardError
from stages.manifest import Manifest, ShardRecord


@dataclass(frozen=True, kw_only=True)
class NumbersConfig:
    counts: tuple[int, ...] = setting((3, 4, 5), "numbers in each shard", affects="stage")


class Numbers(Stage[NumbersConfig]):
    name = "numbers"
    uses_seed = True

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        return [self.shard(i, first=10 * i, count=count) for i, count in enumerate(self.config.counts)]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        started_at = time.monotonic()
        numbers = [self.seed + shard.params["first"] + i for i in range(shard.params["count"])]
        files = {"numbers": ("numbers.json", json.dumps(numbers).encode())}
        return self.commit(shard, output, files, started_at=started_at, num_in=len(numbers), num_kept=len(numbers))


@dataclass(frozen=True, kw_only=True)
class SquaresConfig:
    power: int = setting(2, "exponent")
    keep_even: bool = setting(True, "drop odd results", affects="stage")
    num_workers: int = setting(2, "processes", affects="nothing")
    misbehave: Mapping[str, str] = setting(
        factory=dict, help="first number of a shard -> what it does", affects="nothing"
    )
    scratch: str = setting("", "folder in which misbehaviour is counted", affects="nothing")


class Squares(Stage[SquaresConfig]):
    """Powers of numbers; on request a shard fails in one of the ways a shard can fail."""

    name = "squares"

    @property
    def upstream(self) -> tuple[str, ...]:
        return ("numbers",)

    @property
    def resources(self) -> Resources:
        return Resources(num_cpus=1, max_workers=self.config.num_workers)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        records = inputs["numbers"].records
        if not records:
            raise InputError("numbers: no shard; give numbers.counts")
        return [self.shard(i, inputs=record.files) for i, record in enumerate(records)]

    def setup(self) -> None:
        self.base = 0

    def process(self, shard: Shard, output: str) -> ShardRecord:
        started_at = time.monotonic()
        numbers = json.loads(shard.inputs["numbers"].read(self.root))
        self._misbehave(str(numbers[0]))
        self.report(Progress(done=len(numbers), total=len(numbers), unit="numbers"))
        powers = [self.base + n**self.config.power for n in numbers]
        files = {"powers": ("powers.json", json.dumps(powers).encode())}
        return self.commit(shard, output, files, started_at=started_at, num_in=len(powers), num_kept=len(powers))

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        powers = [power for record in records for power in json.loads(record.files["powers"].read(self.root))]
        kept = [power for power in powers if power % 2 == 0] if self.config.keep_even else powers
        total = self.publish(f"{output}/sum.json", json.dumps(sum(kept)).encode())
        return Result(records=records, files={"sum": total}, metrics={"sum": sum(kept)})

    def _misbehave(self, first: str) -> None:
        how = self.config.misbehave.get(first)
        if how is None:
            return
        marker = Path(self.config.scratch) / f"{first}"
        attempt = int(marker.read_text()) + 1 if marker.exists() else 1
        marker.write_text(str(attempt))
        acts: dict[str, Any] = {
            "flaky": lambda: attempt < 2 and _raise(ShardError("a hiccup", retryable=True)),
            "bug": lambda: attempt < 2 and _raise(ZeroDivisionError("a bug")),
            "corrupt": lambda: _raise(ShardError("beyond repair")),
            "always": lambda: _raise(ShardError("never works", retryable=True)),
            "fatal": lambda: _raise(InputError("squares: the input is wrong")),
            "dies": lambda: attempt < 2 and os._exit(9),
        }
        acts[how]()


def _raise(error: Exception) -> None:
    raise error
