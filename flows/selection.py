"""Which stages a run touches: ``--from``, ``--until``, ``--only`` and ``--force``, checked before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.errors import ConfigError


@dataclass(frozen=True)
class Selection:
    """What a run does.

    Attributes:
        stages: the stages it brings to their end, in the pipeline's order.
        forced: those of them that run anew even if they are done.
    """

    stages: tuple[str, ...]
    forced: frozenset[str] = frozenset()


def select(
    names: Sequence[str],
    *,
    start: str | None = None,
    until: str | None = None,
    only: str | None = None,
    force: Sequence[str] = (),
) -> Selection:
    """Turn the options of the command line into a selection.

    Args:
        names: all stages in the pipeline's order (the order that ``unclip plan`` shows).
        start: leave out the stages before this one.
        until: leave out the stages after this one.
        only: this stage and nothing else.
        force: stages to run anew.

    Raises:
        ConfigError: for a name that is no stage, or options that contradict each other.
    """
    for option, name in [("--from", start), ("--until", until), ("--only", only), *(("--force", f) for f in force)]:
        if name is not None:
            _check_name(option, name, names)
    if only and (start or until):
        raise ConfigError("--only: cannot be joined with --from or --until; choose one")
    first = names.index(only or start or names[0])
    last = names.index(only or until or names[-1])
    if first > last:
        raise ConfigError(f"--from {start} --until {until}: {start} comes after {until}; nothing is left to run")
    chosen = tuple(names[first : last + 1])
    for name in force:
        if name not in chosen:
            raise ConfigError(f"--force {name}: it is not among the stages of this run ({', '.join(chosen)})")
    return Selection(chosen, frozenset(force))


def check_upstream(selection: Selection, upstream: Mapping[str, Sequence[str]], done: Mapping[str, bool]) -> None:
    """Refuse a selection that starts from results which do not exist.

    Args:
        selection: the stages to run.
        upstream: of every stage, the stages it reads.
        done: of every stage, whether its result exists for the present settings.

    Raises:
        ConfigError: names the missing stage and the command that makes it.
    """
    for name in selection.stages:
        for needed in upstream[name]:
            if needed not in selection.stages and not done[needed]:
                raise ConfigError(
                    f"{name}: needs {needed}, which is not done for these settings and not part of this run; "
                    f"run with --until {needed} first, or start with --from {needed}"
                )


def _check_name(option: str, name: str, names: Sequence[str]) -> None:
    if name in names:
        return
    close = difflib.get_close_matches(name.replace("-", "_").lower(), names, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"the stages are: {', '.join(names)}"
    raise ConfigError(f"{option} {name}: no such stage; {hint}")
