"""Versions that must not be used any more: models in them were trained on samples that have been taken down since.

A version's own record never changes; that it is withdrawn is said beside it, once and for good::

    <root>/registry/withdrawn/0003.json

Whoever serves models asks for this file: production may still name a version that has been withdrawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from stages import storage, swap
from stages.clock import utc_now
from stages.errors import InputError, IntegrityError

_FOLDER = "registry/withdrawn"
_RECORD = re.compile(r"(\d{4,})\.json")


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """Why a version is not to be used.

    Attributes:
        number: the version.
        at: when it was withdrawn, UTC.
        models: those of its stages that were trained on what is gone, or started from such a model.
    """

    number: int
    at: str
    models: tuple[str, ...]

    def __str__(self) -> str:
        return f"withdrawn {self.at}: {', '.join(self.models)} learned from samples that were taken down"


def withdraw(root: str, number: int, models: Sequence[str]) -> None:
    """Withdraw a version; a version that is withdrawn already stays as it is."""
    record = asdict(Withdrawal(number=number, at=utc_now(), models=tuple(models)))
    swap.create(_uri(root, number), storage.json_bytes(record))


def read_withdrawn(root: str) -> dict[int, Withdrawal]:
    """Read all withdrawals, by version.

    Raises:
        IntegrityError: if one is damaged.
    """
    names = storage.list_files(storage.join(root, _FOLDER))
    numbers = sorted(int(found[1]) for name in names if (found := _RECORD.fullmatch(name)))
    return {number: _read(root, number) for number in numbers}


def refuse_withdrawn(root: str, number: int, what: str) -> None:
    """Refuse to use a version that has been withdrawn.

    Args:
        root: the store.
        number: the version.
        what: what it was wanted for, for the message.

    Raises:
        InputError: if it has been.
    """
    if storage.exists(_uri(root, number)):
        raise InputError(
            f"{what}: version {number} is {_read(root, number)}; `unclip models list` shows which versions can be used"
        )


def _uri(root: str, number: int) -> str:
    return storage.join(root, _FOLDER, f"{number:04d}.json")


def _read(root: str, number: int) -> Withdrawal:
    uri = _uri(root, number)
    value = storage.read_json(uri)
    try:
        found = Withdrawal(**{**value, "models": tuple(value["models"])})
    except (TypeError, KeyError) as error:
        raise IntegrityError(f"{uri}: not a withdrawal ({error!r}); restore it from a backup") from error
    return found
