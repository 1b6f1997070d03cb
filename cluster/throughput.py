"""How fast a stage was, read from what its finished run left in a store: the ground on which ``cost.py`` estimates.

Nothing is recorded for this alone: manifests hold rows, bytes and seconds of every shard, and trainings log their
samples per second. A measurement counts for a config only where the settings that decide the speed are the same.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stages import storage
from stages.audit import all_results
from stages.base import Stage, identity_of
from stages.errors import UnclipError
from stages.graph import STAGE_NAMES
from stages.manifest import Manifest, manifest_uri
from stages.metrics import read_metrics

logger = logging.getLogger(__name__)

# Settings that change what comes out, but not how fast it comes.
_NOT_SPEED = frozenset(
    {
        *("seed", "num_steps", "learning_rate", "learning_rate_schedule", "warmup_steps", "weight_decay"),
        *("beta1", "beta2", "eps", "gradient_clipping", "ema_decay", "checkpoint_every_steps", "keep_last"),
        *("max_nonfinite_steps", "log_every_steps", "tensorboard", "num_streams", "prefetch_batches"),
        *("lists", "num_images", "num_samples", "samples_per_shard", "captions_uri", "images_per_caption"),
        *("rows_per_shard", "min_clip_accuracy", "num_workers"),
    }
)
# What another stage made and this one runs: its model decides the speed, too.
_MODELS = {
    "embed": ("clip",),
    "evaluate": ("clip",),
    "generate": ("prior", "decoder", "upsampler_256", "upsampler_1024"),
}


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What one finished stage showed.

    Attributes:
        stage: its name.
        fingerprint: of the result it was measured in.
        root: the store that holds it.
        samples_per_s: samples that one worker (a rank, of a training) takes in per second; 0 if it took in none.
        worker_s: seconds of work of all its workers.
        kept_fraction: samples out per sample in.
        num_bytes: of all that its shards published.
        bytes_per_sample: the same, per sample in.
    """

    stage: str
    fingerprint: str
    root: str
    samples_per_s: float
    worker_s: float
    kept_fraction: float
    num_bytes: int
    bytes_per_sample: float


def measure(stage: Stage[Any], manifest: Manifest) -> Throughput:
    """Read the throughput of a finished stage.

    Raises:
        UnclipError: if a training's log cannot be read.
    """
    worker_s = sum(record.wall_time_s for record in manifest.records)
    num_bytes = sum(file.num_bytes for record in manifest.records for file in record.files.values())
    rate = manifest.num_in / worker_s if worker_s > 0 else 0.0
    logs = [record.files["metrics"] for record in manifest.records if "metrics" in record.files]
    if stage.gang and logs:
        lines = [line for log in logs for line in read_metrics(log.read(manifest.root))]
        num_ranks = int(manifest.config.get("num_ranks", 1))
        # The median: the first lines hold the compilation, others a checkpoint.
        rate = statistics.median(line["samples_per_s"] for line in lines) / num_ranks
        worker_s = manifest.wall_time_s * num_ranks
    return Throughput(
        stage=manifest.stage,
        fingerprint=manifest.fingerprint,
        root=manifest.root,
        samples_per_s=rate,
        worker_s=worker_s,
        kept_fraction=manifest.num_kept / manifest.num_in if manifest.num_in else 1.0,
        num_bytes=num_bytes,
        bytes_per_sample=num_bytes / manifest.num_in if manifest.num_in else 0.0,
    )


def measured(stages: Mapping[str, Stage[Any]], roots: list[str]) -> dict[str, Throughput]:
    """Find, for every stage, the newest result whose speed tells that of the stage as it is configured now.

    Args:
        stages: all stages of the config.
        roots: stores to look in, the most telling first.

    Returns:
        Stage -> throughput; stages that were never run with such settings are left out.
    """
    found: dict[str, Throughput] = {}
    wanted = {name: speed_settings(name, stages) for name in stages}
    for root in roots:
        for name, uri, seen in _history(root):
            if name not in found and seen == wanted[name]:
                try:
                    found[name] = measure(stages[name], Manifest.read_uri(root, uri))
                except UnclipError as error:
                    logger.warning("%s is passed over: %s", uri, error)
    return found


def speed_settings(name: str, stages: Mapping[str, Stage[Any]]) -> dict[str, Any]:
    """Return what decides the speed of a stage: its own settings, and the models it runs."""
    configs = {
        stage: identity_of(stages[stage].config, ("shard", "stage", "nothing")) for stage in (name, *_models_of(name))
    }
    return _speed(name, configs)


def _history(root: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield stage and manifest of every result of a store, the newest first, with what decided its speed."""
    listings = {name: storage.list_entries(storage.join(root, name)) for name in STAGE_NAMES}
    entries = {
        (result.stage, result.fingerprint): listings[result.stage][f"{result.fingerprint}/manifest.json"]
        for result in all_results(listings)
    }
    headers: dict[tuple[str, str], Any] = {}

    def header(key: tuple[str, str]) -> Any:
        if key not in headers:
            headers[key] = storage.read_json(manifest_uri(root, *key)) if key in entries else {"config": {}}
        return headers[key]

    for key in sorted(entries, key=lambda key: entries[key].modified_ns, reverse=True):
        try:
            own = header(key)
            inputs = own.get("inputs", {})
            configs = {key[0]: own["config"]}
            for model in _models_of(key[0]):
                if model in inputs:
                    configs[model] = header((model, inputs[model]["fingerprint"]))["config"]
            yield key[0], manifest_uri(root, *key), _speed(key[0], configs)
        except UnclipError as error:
            logger.warning("%s of %s is passed over: %s", *key, error)


def _models_of(name: str) -> tuple[str, ...]:
    return _MODELS.get(name, ())


def _speed(name: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    own = {key: value for key, value in configs[name].items() if key not in _NOT_SPEED}
    if name == "source":
        own = {"kind": own.get("kind")}
    models = {
        model: {key: configs[model].get(key) for key in ("kind", "name", "model")}
        for model in _models_of(name)
        if model in configs
    }
    return {"own": own, "models": models}
