"""Starting a training from weights that exist, and leaving some of them as they are."""

from __future__ import annotations

import difflib
import fnmatch
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages import storage
from stages.base import setting
from stages.errors import ConfigError, InputError, IntegrityError
from stages.finished import finished
from stages.manifest import File
from stages.registry import find_version, weights_in
from stages.weights import checked_copy, content_sum, weights_of
from stages.withdrawn import refuse_withdrawn

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_NUM_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Weights to start from: those of a version, what a finished training exported (its moving average), or a file.

    Their content is part of the training's identity; where they lie is not.
    """

    version: int | Literal["production"] | None = setting(
        None,
        "a version of the models; `production`: the one in production when this training begins",
        affects="nothing",
    )
    file: str | None = setting(None, "a .safetensors file of a model of this project", affects="nothing")
    fingerprint: str | None = setting(None, "of a finished training", affects="nothing")
    stage: str | None = setting(None, "its stage; null: the same as this one", affects="nothing")
    root: str | None = setting(None, "the store it is in; null: this run's", affects="nothing")

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.version, self.file, self.fingerprint)) != 1:
            raise ValueError(
                "file: name either a file, or the fingerprint of a finished training (with its root), or a version"
            )
        if self.file is not None and (self.stage is not None or self.root is not None):
            raise ValueError("file: stage and root go with a fingerprint or a version; a file needs neither")


class SourceWeights:
    """The weights that ``init_from`` names.

    Args:
        settings: from the config.
        root: the run's own store.
        stage: the training's own name.
    """

    def __init__(self, settings: InitFrom, *, root: str, stage: str) -> None:
        self._settings = settings
        self._root = root if settings.root is None else storage.absolute(settings.root)
        self._stage = settings.stage or stage
        self._place = f"{stage}.init_from"

    def sha256(self) -> str:
        """Identify the weights by content.

        Raises:
            InputError: if they are not there.
        """
        if self._settings.file is None:
            return self._published().sha256
        path = Path(self._settings.file).expanduser()
        if not path.is_file():
            raise InputError(f"{self._place}.file: {path}: no such file; name a .safetensors file")
        return content_sum(path)

    def load_into(self, model: nn.Module, sha256: str) -> None:
        """Give a model these weights and buffers.

        Raises:
            IntegrityError: if they are not the ones the training was planned with, or damaged.
            ConfigError: if they are of a model of another shape.
            InputError: if they are of a version that has been withdrawn.
        """
        if isinstance(self._settings.version, int):
            refuse_withdrawn(self._root, self._settings.version, self._place)
        if self.sha256() != sha256:
            raise IntegrityError(f"{self._place}: the weights changed since this training was planned; run again")
        with self._path() as path:
            take_over(model, path, self._place)

    def _published(self) -> File:
        if self._settings.fingerprint is not None:
            return weights_of(finished(self._root, self._stage, self._settings.fingerprint, self._place))
        assert isinstance(self._settings.version, int), "`production` is no version yet, see stages/starting_point.py"
        return weights_in(find_version(self._root, self._settings.version), self._stage, self._place)

    def _path(self) -> AbstractContextManager[Path]:
        if self._settings.file is not None:
            return nullcontext(Path(self._settings.file).expanduser())
        return checked_copy(self._root, self._published())


def take_over(model: nn.Module, path: Path, place: str) -> None:
    """Load all weights and buffers of a file into a model that has the same.

    Settings that leave the shapes alone may differ; they are named in the log.

    Args:
        model: built from the config.
        path: safetensors with a header of this project.
        place: the setting, for messages.

    Raises:
        InputError: if the file cannot be read.
        ConfigError: if it is of another architecture or size; says which settings differ.
    """
    from unclip_models.checkpoint import architecture_header, read_weights

    try:
        header, tensors = read_weights(path)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    own = architecture_header(model)
    if header.get("architecture") != own["architecture"]:
        raise ConfigError(
            f"{place}: {path.name} holds {header.get('architecture', 'no model of this project')}, "
            f"this section trains {own['architecture']}; name weights of the same architecture"
        )
    changed = [
        f"{key}: {json.dumps(there)} there, {json.dumps(here)} here"
        for key, there, here in differences(json.loads(header["config"]), json.loads(own["config"]))
    ]
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        odd = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
        raise ConfigError(
            f"{place}: the weights do not fit this section's model: {len(odd)} tensors differ, the first is {odd[0]} "
            f"({found.get(odd[0], 'none')} there, {wanted.get(odd[0], 'none')} here). Settings that differ: "
            f"{_listed(changed)}"
        )
    if changed:
        logger.warning("%s: the weights fit, but were trained with other settings: %s", place, _listed(changed))
    model.load_state_dict(tensors)


def differences(there: Any, here: Any, prefix: str = "model") -> Iterator[tuple[str, Any, Any]]:
    """List the leaves in which two configs differ, by dotted path; None stands for what is missing."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted(there.keys() | here.keys()):
            yield from differences(there.get(key), here.get(key), f"{prefix}.{key}")
    elif there != here:
        yield prefix, there, here


def frozen_names(names: Sequence[str], patterns: Sequence[str], place: str) -> list[str]:
    """List the parameters that glob patterns name; ``*`` stands for dots too.

    Args:
        names: of all parameters.
        patterns: such as ``text_encoder.*``.
        place: the setting, for messages.

    Raises:
        ConfigError: if a pattern names none, with the closest names; or if nothing is left to train.
    """
    frozen = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ConfigError(f"{place}: {pattern!r} names no parameter; {_suggestion(pattern, names)}")
        frozen.update(matching)
    if len(frozen) == len(set(names)):
        raise ConfigError(f"{place}: {', '.join(patterns)} name all parameters; leave some to train")
    return [name for name in names if name in frozen]


def freeze(model: nn.Module, patterns: Sequence[str], place: str) -> None:
    """Exclude parameters from training: they get no gradient, no optimizer state and no average of their own."""
    frozen = set(frozen_names([name for name, _ in model.named_parameters()], patterns, place))
    for name, param in model.named_parameters():
        if name in frozen:
            param.requires_grad_(False)


def _suggestion(pattern: str, names: Iterable[str]) -> str:
    groups = {".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)}
    close = difflib.get_close_matches(pattern, sorted({*names, *groups}), n=3, cutoff=0.5)
    if close:
        return f"the closest are {', '.join(close)}"
    return f"there are {', '.join(sorted(group for group in groups if group.count('.') == 1))}"


def _listed(items: Sequence[str]) -> str:
    if not items:
        return "none"
    rest = f"; and {len(items) - _NUM_SHOWN} more" if len(items) > _NUM_SHOWN else ""
    return "; ".join(items[:_NUM_SHOWN]) + rest
