"""The history of a store: one small JSON object per run, written when the run begins and again when it ends.

::

    <root>/runs/<run>.json        who ran what when, how every stage ended, and what had been estimated
    <root>/logs/<run>/            its log (``flows/run_log.py``)

A record that says ``running`` long after its run began is of a run that was killed: its end was never written.
"""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import secrets
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flows.progress import Outcome
from stages import storage
from stages.code_version import code_version
from stages.errors import ConfigError, NotFoundError, StorageError
from stages.redaction import hide_secrets

RUNS_FOLDER = "runs"
LOGS_FOLDER = "logs"
KEEP_RUNS = 200
_LONGEST_RUN = datetime.timedelta(days=90)  # what began before and has no end was killed
_READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run of a config on a store.

    Attributes:
        id: begins with the time, so that ids sort by it.
        status: ``running``, ``done``, ``failed`` or ``cancelled``.
        started_at: ISO 8601, UTC.
        ended_at: likewise; empty while it runs.
        seconds: how long it took.
        user: who ran it, and on which host.
        config: the file's name.
        config_digest: of all its settings.
        code_version: of this software.
        selected: the stages it was asked for.
        stages: stage -> ``status`` and ``wall_time_s`` of those that ended.
        errors: one line each.
        exit_code: of the command; None while it runs.
        estimates: stage -> what ``unclip plan --cost`` said of it before the run.
    """

    id: str
    status: str
    started_at: str
    ended_at: str = ""
    seconds: float = 0.0
    user: str = ""
    config: str = ""
    config_digest: str = ""
    code_version: str = ""
    selected: Sequence[str] = field(default_factory=list)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    errors: Sequence[str] = field(default_factory=list)
    exit_code: int | None = None
    estimates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def count(self, *statuses: str) -> int:
        """Count the stages that ended in one of these ways."""
        return sum(stage["status"] in statuses for stage in self.stages.values())


def begin_run(
    root: str, *, config: str, config_digest: str, selected: Sequence[str], estimates: Mapping[str, Mapping[str, Any]]
) -> RunRecord:
    """Write the record of a run that begins."""
    now = _now()
    record = RunRecord(
        id=f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        status="running",
        started_at=now.isoformat(timespec="seconds"),
        user=f"{_user()}@{socket.gethostname()}",
        config=hide_secrets(config),
        config_digest=config_digest[:16],
        code_version=code_version(),
        selected=list(selected),
        estimates=dict(estimates),
    )
    storage.write_json(_uri(root, record.id), record.to_json())
    return record


def end_run(
    root: str, record: RunRecord, *, status: str, outcomes: Sequence[Outcome], errors: Sequence[str], exit_code: int
) -> RunRecord:
    """Write how a run ended."""
    now = _now()
    ended = dataclasses.replace(
        record,
        status=status,
        ended_at=now.isoformat(timespec="seconds"),
        seconds=(now - datetime.datetime.fromisoformat(record.started_at)).total_seconds(),
        stages={o.stage: {"status": o.status, "wall_time_s": round(o.wall_time_s, 3)} for o in outcomes},
        errors=[hide_secrets(line) for line in errors],
        exit_code=exit_code,
    )
    storage.write_json(_uri(root, record.id), ended.to_json())
    return ended


def read_runs(root: str, *, newest: int | None = None) -> list[RunRecord]:
    """Read the history of a store, the newest run first; a record that is being pruned is left out."""
    ids = _ids(root)[:newest]

    def read(run: str) -> RunRecord | None:
        try:
            return RunRecord(**storage.read_json(_uri(root, run)))
        except NotFoundError:
            return None
        except TypeError as error:
            raise StorageError(f"{_uri(root, run)}: not a run record ({error}); delete it") from error

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return [record for record in pool.map(read, ids) if record is not None]


def is_running(root: str, run: str) -> bool:
    """Tell whether a run has not ended, as its record says; a pruned one has."""
    try:
        return bool(storage.read_json(_uri(root, run))["status"] == "running")
    except NotFoundError:
        return False


def find_run(root: str, run: str | None) -> str:
    """Return the id of a run: the newest, or the one whose id begins with ``run``.

    Raises:
        ConfigError: if there is none, or several.
    """
    ids = _ids(root)
    found = [name for name in ids if name.startswith(run)] if run else ids[:1]
    if len(found) != 1:
        what = f"--run {run}: {len(found)} runs have such an id" if run else f"{root}: no run is recorded"
        raise ConfigError(f"{what}; `unclip runs CONFIG` lists them")
    return found[0]


def prune_runs(root: str, *, keep: int = KEEP_RUNS, spare: str = "") -> None:
    """Delete the records and logs of all but the newest runs; never of one that is going on, as a training of weeks is.

    Args:
        root: the store.
        keep: how many.
        spare: the run that has just ended.
    """
    oldest = f"{_now() - _LONGEST_RUN:%Y%m%dT%H%M%SZ}"
    for run in _ids(root)[keep:]:
        if run == spare or (run > oldest and is_running(root, run)):
            continue
        storage.delete_tree(storage.join(root, LOGS_FOLDER, run))
        storage.delete(_uri(root, run))


def _ids(root: str) -> list[str]:
    names = storage.list_files(storage.join(root, RUNS_FOLDER))
    return sorted((name.removesuffix(".json") for name in names if name.endswith(".json")), reverse=True)


def _uri(root: str, run: str) -> str:
    return storage.join(root, RUNS_FOLDER, f"{run}.json")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        return "unknown"
