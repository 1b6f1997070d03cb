"""The model registry: numbered versions in the store, and which of them is in production.

A registry is laid out as::

    <root>/registry/versions/0001.json   a version (``stages/version.py``): written once, never changed
    <root>/registry/versions/0001.md     its model card, made from it
    <root>/registry/production.json      the version in production, and every change of it so far
    <root>/registry/withdrawn/0001.json  it must not be used any more (``stages/withdrawn.py``)
    <root>/registry/starts/              from which version trainings started (``stages/starting_point.py``)

Versions and withdrawals are written once. Every change of production is one conditional write (``stages/swap.py``) of
what was read before the decision: of two promotions at the same time one wins and the other is told, and nobody ever
sees half of one. Its history only grows.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stages import storage, swap
from stages.clock import utc_now
from stages.errors import ConflictError, InputError, IntegrityError
from stages.gate import Decision, PromotionGateConfig, decide
from stages.manifest import File, Manifest
from stages.model_card import model_card
from stages.version import Version, VersionedStage, digest_of_run, lists_of, metrics_of
from stages.withdrawn import refuse_withdrawn

_VERSIONS = "registry/versions"
_PRODUCTION = "registry/production.json"
_RECORD = re.compile(r"(\d{4,})\.json")
_FORMAT_VERSION = 1
_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of production.

    Attributes:
        id: drawn at random; tells apart two writers of the same change.
        at: when, UTC.
        action: what was done.
        number: the version in production from then on.
        before: the version in production until then; None for the first.
        reason: why a promotion was forced past the gate; empty if the gate passed.
        decision: what the gate said; None for a rollback, which returns to what has passed before.
    """

    id: str
    at: str
    action: Literal["promote", "rollback"]
    number: int
    before: int | None
    reason: str = ""
    decision: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        forced = f", forced: {self.reason}" if self.reason else ""
        return f"{self.action} {self.number} (before: {self.before or 'nothing'}){forced}"


@dataclass(frozen=True, kw_only=True)
class Production:
    """What is in production.

    Attributes:
        history: all changes, oldest first.
        token: of the content that was read, to replace exactly this; None if there is none yet.
    """

    history: tuple[Change, ...] = ()
    token: str | None = None

    @property
    def number(self) -> int | None:
        """The version in production; None before the first promotion."""
        return self.history[-1].number if self.history else None

    @property
    def standing(self) -> list[int]:
        """The versions a rollback can go back through, the present one last: promotions that were not taken back."""
        found: list[int] = []
        for change in self.history:
            if change.action == "rollback" and change.number in found:
                del found[len(found) - found[::-1].index(change.number) :]
            else:
                found.append(change.number)
        return found


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """The outcome of a promotion.

    Attributes:
        version: the version in question.
        status: ``promoted``; ``refused`` by the gate, then nothing was written; or ``unchanged``: it was there before.
        before: the version in production until then.
        decision: what the gate said; None if it was not asked.
    """

    version: Version
    status: Literal["promoted", "refused", "unchanged"]
    before: int | None
    decision: Decision | None


# ---- versions -------------------------------------------------------------------------------------------------------


def read_versions(root: str) -> dict[int, Version]:
    """Read all versions, by number, in order.

    Raises:
        IntegrityError: if a record is damaged.
    """
    names = storage.list_files(storage.join(root, _VERSIONS))
    numbers = sorted(int(found[1]) for name in names if (found := _RECORD.fullmatch(name)))
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(numbers, pool.map(lambda number: _read(root, number), numbers), strict=True))


def find_version(root: str, number: int) -> Version:
    """Read one version.

    Raises:
        InputError: if there is none of this number; lists those there are.
    """
    if storage.exists(version_uri(root, number)):
        return _read(root, number)
    known = ", ".join(map(str, read_versions(root))) or "none; `unclip promote` registers the first"
    raise InputError(f"version {number}: {root} has no such version; there are: {known}")


def version_uri(root: str, number: int) -> str:
    """Return where a version is stored."""
    return storage.join(root, _VERSIONS, f"{number:04d}.json")


def card_uri(root: str, number: int) -> str:
    """Return where the model card of a version is stored."""
    return storage.join(root, _VERSIONS, f"{number:04d}.md")


def weights_in(version: Version, stage: str, place: str) -> File:
    """Return the weights of one model of a version.

    Args:
        version: of the models.
        stage: the training.
        place: what asks for them, for messages.

    Raises:
        InputError: if the version has no such model.
    """
    found = version.stages.get(stage)
    if found is None or not found.weights:
        known = ", ".join(name for name, part in version.stages.items() if part.weights) or "none"
        raise InputError(f"{place}: version {version.number} has no weights of {stage}; it has those of: {known}")
    return found.weights[0]


def register(root: str, manifests: Mapping[str, Manifest], gate: PromotionGateConfig) -> Version:
    """Register a finished run; return the version there is if it was registered before.

    Args:
        root: the store.
        manifests: of all stages, in the pipeline's order.
        gate: asked for the record; does not keep a version from being registered.
    """
    version = _registered(root, manifests, gate)
    if not storage.exists(card_uri(root, version.number)):  # also if whoever registered it died before
        storage.write_bytes(card_uri(root, version.number), model_card(version).encode())
    return version


def _registered(root: str, manifests: Mapping[str, Manifest], gate: PromotionGateConfig) -> Version:
    digest, metrics = digest_of_run(manifests), metrics_of(manifests)
    while True:
        known = read_versions(root)
        for version in known.values():
            if version.digest == digest:
                return version
        version = Version(
            number=max(known, default=0) + 1,
            created_at=utc_now(),
            digest=digest,
            stages={name: VersionedStage.of(manifest) for name, manifest in manifests.items()},
            lists=lists_of(manifests["source"]) if "source" in manifests else (),
            metrics=metrics,
            decision=_ask(root, gate, metrics, read_production(root)),
        )
        # Another may have taken the number since: look again, it may even have been the same run.
        record = json.dumps(version.to_json(), indent=1) + "\n"  # unsorted: stages stay in the pipeline's order
        if swap.create(version_uri(root, version.number), record.encode()) is not None:
            return _read(root, version.number)


def _read(root: str, number: int) -> Version:
    uri = version_uri(root, number)
    value = storage.read_json(uri)
    try:
        return Version.from_json(value)
    except IntegrityError as error:
        raise IntegrityError(f"{uri}: {error}") from error


# ---- production -----------------------------------------------------------------------------------------------------


def read_production(root: str) -> Production:
    """Read what is in production.

    Raises:
        IntegrityError: if the record is damaged.
    """
    uri = storage.join(root, _PRODUCTION)
    found = swap.read(uri)
    if found is None:
        return Production()
    try:
        value = json.loads(found.data)
        production = Production(history=tuple(Change(**change) for change in value["history"]), token=found.version)
        if value["format_version"] != _FORMAT_VERSION or value["number"] != production.number:
            raise ValueError("its number is not that of its last change, or its format is unknown")
    except (TypeError, KeyError, ValueError) as error:
        raise IntegrityError(f"{uri}: not a record of production ({error}); restore it from a backup") from error
    return production


def promote(root: str, number: int, gate: PromotionGateConfig, *, force_reason: str = "") -> Promotion:
    """Put a version into production if the gate lets it.

    Args:
        root: the store.
        number: the version.
        gate: the rules.
        force_reason: promotes past a gate that does not pass; kept in the history.

    Raises:
        InputError: if there is no such version, or it has been withdrawn.
        IntegrityError: if its weights are not there any more.
        ConflictError: if production was changed by another meanwhile; nothing is written then.
    """
    production = read_production(root)  # before the decision: the write below counts only if this still stands
    version = find_version(root, number)
    refuse_withdrawn(root, number, "promote")
    if production.number == number:
        return Promotion(version=version, status="unchanged", before=number, decision=None)
    decision = _ask(root, gate, version.metrics, production)
    if not decision.passed and not force_reason:
        return Promotion(version=version, status="refused", before=production.number, decision=decision)
    _check_present(root, version)
    _change(
        root,
        production,
        action="promote",
        number=number,
        reason="" if decision.passed else force_reason,
        decision=decision.to_json(),
    )
    return Promotion(version=version, status="promoted", before=production.number, decision=decision)


def ask_gate(root: str, gate: PromotionGateConfig, metrics: Mapping[str, Any]) -> Decision:
    """Tell what the gate says of a version's or a run's metrics (``metrics_of``) beside production; changes nothing."""
    return _ask(root, gate, metrics, read_production(root))


def rollback(root: str, to: int | None = None) -> Change:
    """Put a version into production again.

    Args:
        root: the store.
        to: a version that has been in production; the one before the present one if not given.

    Raises:
        InputError: if there is nothing to go back to, or ``to`` has never been in production or has been withdrawn.
        IntegrityError: if its weights are not there any more.
        ConflictError: if production was changed by another meanwhile; nothing is written then.
    """
    production = read_production(root)
    number = _target(production, to)
    refuse_withdrawn(root, number, "rollback")
    _check_present(root, find_version(root, number))
    return _change(root, production, action="rollback", number=number)


def _target(production: Production, to: int | None) -> int:
    standing = production.standing
    if to is None:
        if len(standing) < 2:
            there = f"version {standing[-1]} has none before it" if standing else "nothing is in production"
            raise InputError(f"rollback: {there}; `unclip promote` puts a version into production")
        return standing[-2]
    if to == production.number:
        raise InputError(f"rollback: version {to} is in production; name another, or leave out --to")
    if all(change.number != to for change in production.history):
        raise InputError(
            f"rollback: version {to} has never been in production; `unclip promote --version {to}` asks the gate"
        )
    return to


def _ask(root: str, gate: PromotionGateConfig, metrics: Mapping[str, Any], production: Production) -> Decision:
    """Ask the gate, beside the version in production."""
    number = production.number
    before = None if number is None else find_version(root, number).metrics
    return decide(gate, metrics, production=before, compared_with=number)


def open_version(root: str, which: int | Literal["production"]) -> tuple[Version, dict[str, Manifest]]:
    """Give a version to be used: its record, and the results it consists of that are still in the store.

    Raises:
        InputError: if there is no such version, nothing is in production, or it has been withdrawn.
        IntegrityError: if its weights are not there any more.
    """
    number = read_production(root).number if which == "production" else which
    if number is None:
        raise InputError(f"{root}: nothing is in production yet; `unclip promote` puts a version there")
    version = find_version(root, number)
    refuse_withdrawn(root, number, "use")
    _check_present(root, version)
    found = {name: Manifest.read(root, name, stage.fingerprint) for name, stage in version.stages.items()}
    return version, {n: m for n, m in found.items() if m is not None and m.digest == version.stages[n].digest}


def _check_present(root: str, version: Version) -> None:
    """Refuse a version whose weights are gone, or were made anew (``--force``) under the same name."""
    for name, stage in version.stages.items():
        if not stage.weights:
            continue
        manifest = Manifest.read(root, name, stage.fingerprint)
        if manifest is None or manifest.digest != stage.digest:
            what = "is gone" if manifest is None else "was made anew since, with another result"
            raise IntegrityError(f"version {version.number}: {stage.manifest} {what}; promote the present run instead")
        for file in stage.weights:
            if not storage.exists(storage.join(root, file.path)):
                raise IntegrityError(f"version {version.number}: {file.path} is gone; restore it from a backup")


def _change(
    root: str,
    production: Production,
    *,
    action: Literal["promote", "rollback"],
    number: int,
    reason: str = "",
    decision: Mapping[str, Any] | None = None,
) -> Change:
    """Write one more change, if production is still what was read."""
    change = Change(
        id=secrets.token_hex(8),
        at=utc_now(),
        action=action,
        number=number,
        before=production.number,
        reason=reason,
        decision=decision,
    )
    history = [asdict(item) for item in (*production.history, change)]
    data = storage.json_bytes({"format_version": _FORMAT_VERSION, "number": number, "history": history})
    uri = storage.join(root, _PRODUCTION)
    written = swap.create(uri, data) if production.token is None else swap.replace(uri, data, production.token)
    if written is None:
        now = read_production(root).number
        raise ConflictError(
            f"{action} of version {number}: another change of production came first, version {now} is in production "
            "now; see `unclip models list`, then try again"
        )
    return change
