"""A version of the models: the record of one finished run, and what distinguishes two of them.

A version repeats what its manifests say in numbers and names (settings, lists, rows, weights), so that it can be read
and compared when they are gone. Paths are relative to the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.errors import IntegrityError
from stages.gate import Decision
from stages.manifest import MANIFEST_NAME, File, Manifest, digest_of
from stages.validation_config import LOSS
from stages.weights import ROLE

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class VersionedStage:
    """The part of a version that one stage made.

    Attributes:
        manifest: path of its manifest.
        fingerprint: names the result.
        digest: of all it produced.
        code_version: of this software, when the stage ran.
        num_in: samples that came in.
        num_kept: samples that went out.
        config: its settings.
        weights: files of weights it published.
    """

    manifest: str
    fingerprint: str
    digest: str
    code_version: str
    num_in: int
    num_kept: int
    config: Mapping[str, Any]
    weights: tuple[File, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> VersionedStage:
        """Take what counts from a manifest."""
        published = (manifest.files, *(record.files for record in manifest.records))
        return cls(
            manifest=f"{manifest.stage}/{manifest.fingerprint}/{MANIFEST_NAME}",
            fingerprint=manifest.fingerprint,
            digest=manifest.digest,
            code_version=manifest.code_version,
            num_in=manifest.num_in,
            num_kept=manifest.num_kept,
            config=manifest.config,
            weights=tuple(files[ROLE] for files in published if ROLE in files),
        )


@dataclass(frozen=True, kw_only=True)
class UrlList:
    """A list as the source stage has read it: its name, the sha256 of its content, how many rows."""

    name: str
    sha256: str
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered run.

    Attributes:
        number: 1, 2, ... in the order of registration.
        created_at: when it was registered.
        digest: of what its stages produced; two runs with the same products are one version.
        stages: by name, in the pipeline's order.
        lists: the URL lists its data came from; empty for procedural pictures.
        metrics: of the evaluate stage, with its verdict under ``gate``, and the validation losses of the trainings.
        decision: what the gate said when the version was registered.
    """

    number: int
    created_at: str
    digest: str
    stages: Mapping[str, VersionedStage]
    lists: tuple[UrlList, ...]
    metrics: Mapping[str, Any]
    decision: Decision

    @property
    def code_versions(self) -> list[str]:
        """Versions of this software that made it."""
        return sorted({stage.code_version for stage in self.stages.values() if stage.code_version})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format_version": FORMAT_VERSION, **asdict(self), "decision": self.decision.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Version:
        """Rebuild a version from ``to_json``.

        Raises:
            IntegrityError: if it is not one, or of a format this software does not know.
        """
        try:
            fields = dict(value)
            if (found := fields.pop("format_version")) != FORMAT_VERSION:
                raise IntegrityError(f"format version {found} is not {FORMAT_VERSION}; use the software that wrote it")
            fields["decision"] = Decision.from_json(fields["decision"])
            fields["lists"] = tuple(UrlList(**item) for item in fields["lists"])
            fields["stages"] = {
                name: VersionedStage(**{**stage, "weights": tuple(File(**file) for file in stage["weights"])})
                for name, stage in fields["stages"].items()
            }
            return cls(**fields)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise IntegrityError(f"not a version of the models: {error!r}") from error


def digest_of_run(manifests: Mapping[str, Manifest]) -> str:
    """Hash what all stages of a run produced."""
    return digest_of({name: manifest.digest for name, manifest in manifests.items()})


def metrics_of(manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """Return what a version is judged by: metrics of evaluate, and ``<training>_validation_loss`` where measured."""
    losses = {
        f"{name}_{LOSS}": record.metrics[LOSS]
        for name, manifest in manifests.items()
        for record in manifest.records
        if LOSS in record.metrics
    }
    return {**manifests["evaluate"].metrics, **losses}


def lists_of(source: Manifest) -> tuple[UrlList, ...]:
    """Return the URL lists that a source stage has cut into shards."""
    num_rows: dict[tuple[str, str], int] = {}
    for record in source.records:
        if "list" in record.metrics:
            key = record.metrics["list"], record.metrics["list_sha256"]
            num_rows[key] = num_rows.get(key, 0) + record.num_kept
    return tuple(UrlList(name=name, sha256=sha256, num_rows=n) for (name, sha256), n in num_rows.items())


@dataclass(frozen=True, kw_only=True)
class VersionDiff:
    """What distinguishes two versions; pairs are (of a, of b), with None where one has no such thing.

    Attributes:
        a: number of the first.
        b: number of the second.
        results: stages whose products differ.
        config: ``stage.setting`` -> values.
        added: lists that only b has.
        removed: lists that only a has.
        changed: name -> the two contents of a list that both have.
        rows: stage -> samples that went out.
        metrics: metric -> values.
        code: stage -> versions of this software.
    """

    a: int
    b: int
    results: Sequence[str]
    config: Mapping[str, tuple[Any, Any]]
    added: Sequence[UrlList]
    removed: Sequence[UrlList]
    changed: Mapping[str, tuple[UrlList, UrlList]]
    rows: Mapping[str, tuple[int | None, int | None]]
    metrics: Mapping[str, tuple[Any, Any]]
    code: Mapping[str, tuple[str | None, str | None]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def compare(a: Version, b: Version) -> VersionDiff:
    """Tell what distinguishes ``b`` from ``a``."""
    lists_a, lists_b = ({item.name: item for item in version.lists} for version in (a, b))
    both = lists_a.keys() & lists_b.keys()
    return VersionDiff(
        a=a.number,
        b=b.number,
        results=list(_differing(_by_stage(a, lambda s: s.digest), _by_stage(b, lambda s: s.digest))),
        config=_differing(_flat_config(a), _flat_config(b)),
        added=[item for name, item in lists_b.items() if name not in both],
        removed=[item for name, item in lists_a.items() if name not in both],
        changed={name: (lists_a[name], lists_b[name]) for name in sorted(both) if lists_a[name] != lists_b[name]},
        rows=_differing(_by_stage(a, lambda s: s.num_kept), _by_stage(b, lambda s: s.num_kept)),
        metrics=_differing(_flat(a.metrics), _flat(b.metrics)),
        code=_differing(_by_stage(a, lambda s: s.code_version), _by_stage(b, lambda s: s.code_version)),
    )


def _by_stage(version: Version, value: Callable[[VersionedStage], Any]) -> dict[str, Any]:
    return {name: value(stage) for name, stage in version.stages.items()}


def _flat_config(version: Version) -> dict[str, Any]:
    return _flat(_by_stage(version, lambda stage: stage.config))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested settings as dotted keys."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= _flat(item, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = item
    return found


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs; a value that is not there differs from a null."""
    names = dict.fromkeys((*a, *b))
    return {n: (a.get(n), b.get(n)) for n in names if (n in a) != (n in b) or a.get(n) != b.get(n)}
