"""Metrics in Weights & Biases, for those who want them there; a training never needs it.

A training is one W&B run, whose id is a hash of the training's folder: resumed, it goes on in the same run. Steps are
an axis of their own, because a training that resumes repeats some. The key is W&B's own affair (``WANDB_API_KEY``).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages import storage
from stages.base import setting
from stages.errors import ConfigError
from stages.pictures import Pixels

logger = logging.getLogger(__name__)


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
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                id=hashlib.sha256(storage.absolute(folder).encode()).hexdigest()[:16],
                resume="allow",
                name=name,
                config=dict(settings),
                dir=_directory(folder),
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True),
            )
            self._run.define_metric("*", step_metric="step")
        except wandb.errors.Error as error:  # no network, a wrong key: a month of training does not hang on that
            logger.warning("wandb: %s; the training goes on without it", error)

    def write(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Log the numbers of a step."""
        if self._run is not None:
            self._run.log({"step": step, **{name: value for name, value in numbers.items() if value is not None}})

    def show(self, step: int, picture: Pixels) -> None:
        """Log a grid of samples."""
        if self._run is not None:
            self._run.log({"step": step, "samples": self._wandb.Image(picture)})

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()


def _directory(folder: str) -> str | None:
    """Keep W&B's files with the training if the store is local; else where ``WANDB_DIR`` says, or here."""
    if not storage.is_local(folder) or "WANDB_DIR" in os.environ:
        return None
    Path(storage.absolute(folder)).mkdir(parents=True, exist_ok=True)
    return storage.absolute(folder)
