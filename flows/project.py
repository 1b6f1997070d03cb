"""A config with everything that follows from it without running anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.base import Stage
    from stages.config import Config
    from stages.manifest import Manifest
    from stages.runner import StageState


@dataclass(frozen=True, kw_only=True)
class Project:
    """What a command knows of a pipeline.

    Attributes:
        config: the settings.
        stages: all stages, in order.
        states: what the store holds of each.
    """

    config: Config
    stages: Mapping[str, Stage[Any]]
    states: Mapping[str, StageState]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Stage -> name of its output."""
        return {name: state.fingerprint for name, state in self.states.items()}

    @property
    def manifests(self) -> dict[str, Manifest]:
        """Stage -> manifest, of the finished stages."""
        return {name: state.manifest for name, state in self.states.items() if state.manifest is not None}


def open_project(path: str, overrides: Sequence[str]) -> Project:
    """Read a config and look at its store.

    Raises:
        ConfigError: if the config is wrong.
        InputError: if an input outside the store is missing.
    """
    from stages.config import load_config

    return project_of(load_config(path, overrides))


def project_of(config: Config) -> Project:
    """Look at the store of a config.

    Raises:
        InputError: if an input outside the store is missing.
    """
    from stages.graph import build_stages, fingerprints, inspect_all

    stages = build_stages(config)
    return Project(config=config, stages=stages, states=inspect_all(stages, fingerprints(stages)))
