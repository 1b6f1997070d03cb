"""Retraining as one loop: what is new is processed, the models start from those in production, the gate decides.

Every step is found done when it is repeated, so the loop is resumed by calling it again: shards and checkpoints by the
run, the version by its digest, the promotion by what is in production.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from flows.production_note import in_words, refusal
from flows.project import Project
from flows.selection import Selection
from stages.errors import ConfigError, ConflictError, StageError

if TYPE_CHECKING:
    from stages.gate import Decision
    from stages.version import Version

_ATTEMPTS = 3

Status = Literal["promoted", "refused", "held", "taken back", "unchanged", "failed"]


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """How a retraining ended.

    Attributes:
        root: the store.
        status: ``promoted``; ``refused`` by the gate; ``held``: it was asked not to promote; ``taken back``: this very
            version has been in production and was rolled back, which only a person undoes; ``unchanged``: it is in
            production already; ``failed``: the run did not come to its end.
        run_code: exit code of the run; 0 also where nothing had to run.
        has_run: whether anything had to be made.
        version: the version that the run is; None if it failed.
        production: number of the version in production now.
        decision: what the gate said; None if it was not asked.
    """

    root: str
    status: Status
    run_code: int = 0
    has_run: bool
    version: Version | None = None
    production: int | None
    decision: Decision | None = None

    @property
    def said(self) -> str:
        """How it ended, in one line."""
        production = in_words(self.production)
        if self.version is None:
            return f"not finished, the same command goes on; in production is {production}"
        number = self.version.number
        return {
            "refused": refusal(number, self.production),
            "held": f"version {number} is registered; "
            f"`unclip promote CONFIG --version {number}` puts it into production",
            "taken back": f"version {number} was taken back from production, which holds {production}; "
            f"`unclip promote CONFIG --version {number}` puts it there again",
        }.get(self.status, f"version {number} is in production")


def retrain(
    look: Callable[[], Project],
    bring_to_end: Callable[[Project, Selection], int],
    *,
    promote: bool = True,
    from_scratch: bool = False,
) -> Retrained:
    """Bring a pipeline to its end, register it, ask the gate, and promote.

    Args:
        look: reads the config and its store; called again where a decision changes what there is to do.
        bring_to_end: runs stages of a project; returns an exit code.
        promote: whether to put into production what the gate lets pass.
        from_scratch: trainings of these data start from random weights where the config says production.

    Raises:
        UnclipError: if the config, a list or the registry is wrong; production is left alone then.
    """
    from stages.graph import inspect_all
    from stages.registry import ask_gate, read_production, register

    project = look()
    if from_scratch:
        _start_from_scratch(project)
        project = look()
    root, gate = project.config.root, project.config.gate
    has_run = any(state.status != "done" for state in project.states.values())
    if has_run:
        code = bring_to_end(project, Selection(tuple(project.stages)))
        if code:
            number = read_production(root).number
            return Retrained(root=root, status="failed", run_code=code, has_run=True, production=number)
        # What this run made, by its own names: lists that have appeared meanwhile are for the next one.
        project = replace(project, states=inspect_all(dict(project.stages), project.fingerprints))
    if missing := [name for name in project.stages if name not in project.manifests]:
        raise StageError(f"retrain: {', '.join(missing)} changed while the run was going on; run again")
    version = register(root, project.manifests, gate)
    production = read_production(root)
    if production.number == version.number:
        return Retrained(root=root, status="unchanged", has_run=has_run, version=version, production=version.number)
    has_stood = any(change.number == version.number for change in production.history)
    if has_stood and version.number not in production.standing:
        return Retrained(root=root, status="taken back", has_run=has_run, version=version, production=production.number)
    if not promote:
        decision = ask_gate(root, gate, version.metrics)
        return Retrained(
            root=root, status="held", has_run=has_run, version=version, production=production.number, decision=decision
        )
    return _promote(project, version, has_run)


def _promote(project: Project, version: Version, has_run: bool) -> Retrained:
    """Promote, asking the gate again where production is changed by another meanwhile."""
    from stages.registry import promote

    for attempt in range(_ATTEMPTS):
        try:
            outcome = promote(project.config.root, version.number, project.config.gate)
            break
        except ConflictError:
            if attempt == _ATTEMPTS - 1:
                raise
    return Retrained(
        root=project.config.root,
        status=outcome.status,
        has_run=has_run,
        version=version,
        production=outcome.before if outcome.status == "refused" else version.number,
        decision=outcome.decision,
    )


def _start_from_scratch(project: Project) -> None:
    from stages.generator_training import Training
    from stages.starting_point import start_from_scratch

    starts = [stage.start for stage in project.stages.values() if isinstance(stage, Training) and stage.start]
    if not starts:
        raise ConfigError(
            "--from-scratch: no training of this config starts from production; write init_from: {version: production}"
        )
    for start in starts:
        start_from_scratch(project.config.root, start)
