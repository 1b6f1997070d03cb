"""Metrics in Weights & Biases, for those who want them there; a training never needs it.

A training is one W&B run, whose id is a hash of the training's folder: resumed, it goes on in the same run. Steps are
an axis of their own, because a training that resumes repeats some. The key is W&B's own affair (``WANDB_API_KEY``).
Whatever W&B meets, its own process and the way to its server included, is told in the log, and the training goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages import storage
from stages.base import setting
from stages.errors import ConfigError
from stages.pictures import Pixels

logger = logging.getLogger(__name__)

WANDB_NAME = "wandb"  # folder of its files in that of a training
_FINISH_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases beside the JSON lines."""

    project: str | None = setting(None, "project to log to; null: W&B is not used")
    entity: str | None = setting(None, "user or team; null: the default of the key")
    mode: Literal["online", "offline"] = setting("online", "offline: files to be sent later by `wandb sync`")


class WandbLog:
    """One run in W&B; used by the first rank.

    Args:
        config: with a project.
        folder: URI of the training's folder, which identifies the run.
        name: of the run, for people.
        settings: all settings of the training.

    Raises:
        ConfigError: if W&B is not installed.
    """

    def __init__(self, config: WandbConfig, folder: str, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("wandb.project: W&B is not installed; `pip install wandb`, or write null") from error
        self._wandb: Any = wandb
        self._run: Any = None
        self._try(lambda: self._open(config, folder, name, settings))

    def write(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Log the numbers of a step."""
        self._log({"step": step, **{name: value for name, value in numbers.items() if value is not None}})

    def show(self, step: int, picture: Pixels) -> None:
        """Log a grid of samples."""
        if self._run is not None:
            self._log({"step": step, "samples": self._wandb.Image(picture)})

    def close(self) -> None:
        """Send what is left; a server that does not answer is waited for a while only."""
        run, self._run = self._run, None
        if run is not None:
            self._try(run.finish)

    def _open(self, config: WandbConfig, folder: str, name: str, settings: Mapping[str, Any]) -> None:
        run = self._wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            id=hashlib.sha256(storage.absolute(folder).encode()).hexdigest()[:16],
            resume="allow",
            name=name,
            config=dict(settings),
            dir=_directory(folder),
            settings=self._wandb.Settings(
                console="off",
                silent=True,
                x_disable_stats=True,
                disable_git=True,
                finish_timeout=_FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("*", step_metric="step")
        self._run = run

    def _log(self, values: Mapping[str, Any]) -> None:
        run = self._run
        if run is not None:
            self._try(lambda: run.log(values))

    def _try(self, call: Callable[[], Any]) -> None:
        """Call W&B; where that fails a month of training does not end with it, but goes on without W&B."""
        try:
            call()
        except (self._wandb.errors.Error, OSError) as error:  # a wrong key, no network; its process is gone
            self._run = None
            logger.warning("wandb: %s; the training goes on without it", f"{error}" or type(error).__name__)


def _directory(folder: str) -> str | None:
    """Keep W&B's files with the training if the store is local; else where ``WANDB_DIR`` says, or here."""
    if not storage.is_local(folder) or "WANDB_DIR" in os.environ:
        return None
    Path(storage.absolute(folder)).mkdir(parents=True, exist_ok=True)
    return storage.absolute(folder)
