"""What has seen samples that are to go: models, the versions they are in, and pictures drawn while they trained.

A model has seen what was in the curated sets it was trained on, and what the model it started from had seen. Sets are
known by shard, so a model counts as soon as a shard of the sample's was among what it read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stages import storage
from stages.manifest import MANIFEST_NAME, Manifest, manifest_uri
from stages.metrics import SAMPLES_NAME, TENSORBOARD_NAME
from stages.registry import read_versions
from stages.version import Version
from stages.wandb_log import WANDB_NAME
from stages.weights import ROLE

_CHECKPOINTS = "checkpoints"  # stages/checkpoints.py, which needs torch
Name = tuple[str, str]  # stage and fingerprint of a result


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """What has seen the samples.

    Attributes:
        models: finished trainings: stage, fingerprint, weights.
        versions: number of a version -> those of its models.
        pictures: paths of sample grids and TensorBoard files that show held-out images.
        checkpoints: folders of checkpoints that the models' trainings have left, and those of unfinished trainings,
            since nobody has recorded what these read.
    """

    models: Sequence[Mapping[str, str]] = ()
    versions: Mapping[int, Sequence[str]] = field(default_factory=dict)
    pictures: Sequence[str] = ()
    checkpoints: Sequence[str] = ()


def find_exposed(root: str, gone: set[Name], data_stages: Sequence[str]) -> Exposed:
    """Find what has seen results that are to be deleted; changes nothing.

    Args:
        root: the store.
        gone: those results.
        data_stages: stages that hold data and no models.
    """
    names = [name for name in storage.list_files(root) if name.split("/")[0] not in data_stages]
    trainings = {(manifest.stage, manifest.fingerprint): manifest for manifest in _trainings(root, names)}
    if gone:
        # What is not there at present (a takedown that was interrupted, a stage that is done anew) may have held them.
        read = {(s, str(m.inputs[s]["fingerprint"])) for m in trainings.values() for s in m.inputs if s in data_stages}
        gone = gone | {name for name in read if not storage.exists(manifest_uri(root, *name))}
    exposed = {name for name, manifest in trainings.items() if _read_by(manifest) & gone}
    looked_at = exposed | {name for name, manifest in trainings.items() if _validated_on(manifest) & gone}
    versions = read_versions(root)
    while True:
        in_versions = {number: found for number, v in versions.items() if (found := _models_in(v, exposed))}
        descended = {n for n, m in trainings.items() if _started_from(root, m, exposed, in_versions)} - exposed
        if not descended:
            break
        exposed |= descended
    return Exposed(
        models=[
            {"stage": stage, "fingerprint": fingerprint, "weights": _weights(trainings[stage, fingerprint])[0]}
            for stage, fingerprint in sorted(exposed)
        ],
        versions=in_versions,
        pictures=list(_pictures(names, [trainings[name] for name in looked_at])) if gone else [],
        checkpoints=list(_checkpoints(names, [trainings[name] for name in exposed])) if gone else [],
    )


def _trainings(root: str, names: Sequence[str]) -> Iterator[Manifest]:
    for name in names:
        if name.count("/") == 2 and name.endswith("/" + MANIFEST_NAME):
            manifest = Manifest.read_uri(root, storage.join(root, name))
            if _weights(manifest):
                yield manifest


def _weights(manifest: Manifest) -> list[str]:
    return [record.files[ROLE].path for record in manifest.records if ROLE in record.files]


def _read_by(manifest: Manifest) -> set[Name]:
    """Name the results a training was made from, the curated sets mixed in included."""
    read = {(stage, str(facts["fingerprint"])) for stage, facts in manifest.inputs.items()}
    return read | {("curate", str(one["fingerprint"])) for one in manifest.config.get("datasets") or ()}


def _validated_on(manifest: Manifest) -> set[Name]:
    dataset = (manifest.config.get("validation") or {}).get("dataset")
    return {("curate", str(dataset["fingerprint"]))} if dataset else set()


def _models_in(version: Version, exposed: set[Name]) -> list[str]:
    return [name for name, part in version.stages.items() if part.weights and (name, part.fingerprint) in exposed]


def _started_from(root: str, manifest: Manifest, exposed: set[Name], versions: Mapping[int, Sequence[str]]) -> bool:
    init = manifest.config.get("init_from") or {}
    stage, number = init.get("stage") or manifest.stage, init.get("version") or 0
    is_of_here = storage.absolute(init.get("root") or root) == storage.absolute(root)  # elsewhere numbers mean others
    return (is_of_here and stage in versions.get(number, ())) or (stage, init.get("fingerprint")) in exposed


def _pictures(names: Sequence[str], trainings: Sequence[Manifest]) -> Iterator[str]:
    """List what these trainings and unfinished ones have drawn."""
    kept_in = (SAMPLES_NAME, TENSORBOARD_NAME, WANDB_NAME)
    return (name for folder, name in _left_by(names, trainings) if folder in kept_in)


def _checkpoints(names: Sequence[str], trainings: Sequence[Manifest]) -> Iterator[str]:
    """List the folders in which these trainings and unfinished ones have checkpoints."""
    found = (name for folder, name in _left_by(names, trainings) if folder == _CHECKPOINTS)
    return iter(dict.fromkeys("/".join(name.split("/")[:4]) for name in found))


def _left_by(names: Sequence[str], trainings: Sequence[Manifest]) -> Iterator[tuple[str, str]]:
    """List files in the folders of these trainings and of unfinished ones, each with the folder's part it is in."""
    seen = {(manifest.stage, record.shard_id) for manifest in trainings for record in manifest.records}
    finished = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    for name in names:
        stage, *parts = name.split("/")
        if len(parts) > 2 and parts[0] == "shards":
            shard = parts[1]
            if (stage, shard) in seen or f"{stage}/shards/{shard}" not in finished:
                yield parts[2], name
