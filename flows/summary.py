"""The two files a run leaves at the top of the store: ``report.html`` for people, ``report.json`` for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.progress import Outcome, describe
from stages import storage
from stages.config import Config, to_values
from stages.errors import StorageError
from stages.manifest import Manifest, digest_of


def report_uri(root: str) -> str:
    """Return where the report of a store is."""
    return storage.join(root, "report.html")


def write_summary(manifests: Mapping[str, Manifest], config: Config) -> str:
    """Write the report and, last, the JSON beside it.

    Args:
        manifests: the finished stages; the report of an unfinished run shows those.
        config: what was run.

    Returns:
        The URI of the report.
    """
    from flows.report import write_report

    uri = report_uri(config.root)
    write_report(manifests, config, uri)
    summary = {
        "digest": _digest(manifests, config),
        "report": uri,
        "stages": {
            name: {
                "manifest": manifest.uri,
                "fingerprint": manifest.fingerprint,
                "digest": manifest.digest,
                "num_in": manifest.num_in,
                "num_kept": manifest.num_kept,
                "dropped": manifest.dropped,
                "metrics": dict(manifest.metrics),
            }
            for name, manifest in manifests.items()
        },
    }
    storage.write_json(_json_uri(config.root), summary)
    return uri


def is_current(manifests: Mapping[str, Manifest], config: Config) -> bool:
    """Tell whether the report in the store shows exactly these results."""
    try:
        found = storage.read_json(_json_uri(config.root))
    except StorageError:
        return False
    return bool(found.get("digest") == _digest(manifests, config) and storage.exists(report_uri(config.root)))


def outcome_to_json(outcome: Outcome, fingerprint: str) -> dict[str, Any]:
    """Return how a stage ended as plain JSON values."""
    value: dict[str, Any] = {
        "stage": outcome.stage,
        "status": outcome.status,
        "fingerprint": fingerprint,
        "wall_time_s": round(outcome.wall_time_s, 3),
    }
    if outcome.manifest is not None:
        value |= {
            "manifest": outcome.manifest.uri,
            "num_shards": len(outcome.manifest.records),
            "num_in": outcome.manifest.num_in,
            "num_kept": outcome.manifest.num_kept,
            "quarantined": dict(outcome.manifest.quarantined),
        }
    elif outcome.status != "cancelled":
        value["error"] = describe(outcome)
    return value


def run_to_json(
    status: str,
    root: str,
    report: str,
    outcomes: Sequence[Outcome],
    fingerprints: Mapping[str, str],
    errors: Sequence[str],
) -> dict[str, Any]:
    """Return a whole run as plain JSON values, for ``unclip run --json``."""
    return {
        "status": status,
        "root": root,
        "report": report,
        "stages": [outcome_to_json(outcome, fingerprints[outcome.stage]) for outcome in outcomes],
        "errors": list(errors),
    }


def _json_uri(root: str) -> str:
    return storage.join(root, "report.json")


def _digest(manifests: Mapping[str, Manifest], config: Config) -> str:
    return digest_of({"config": to_values(config), "stages": {name: m.digest for name, m in manifests.items()}})
