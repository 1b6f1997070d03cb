"""All stages of a config, in order, with the fingerprints of what they make."""

from __future__ import annotations

from typing import Any

from stages.base import Stage
from stages.clip import Clip
from stages.config import Config
from stages.curate import Curate
from stages.download import Download
from stages.embed import Embed
from stages.evaluate import Evaluate
from stages.filter import Filter
from stages.generate import Generate
from stages.ledger import Ledger
from stages.manifest import Manifest
from stages.pca import Pca
from stages.runner import StageState, inspect_stage
from stages.source import Source
from stages.train import Decoder, Prior, Upsampler256, Upsampler1024

# Every stage comes after the stages it reads.
STAGES: tuple[type[Stage[Any]], ...] = (
    Source,
    Download,
    Filter,
    Clip,
    Embed,
    Curate,
    Ledger,
    Pca,
    Prior,
    Decoder,
    Upsampler256,
    Upsampler1024,
    Generate,
    Evaluate,
)
STAGE_NAMES: tuple[str, ...] = tuple(stage.name for stage in STAGES)


def build_stages(config: Config) -> dict[str, Stage[Any]]:
    """Build every stage of a config, in order; a section may have a seed of its own."""
    stages: dict[str, Stage[Any]] = {}
    for kind in STAGES:
        section = getattr(config, kind.name)
        own_seed = getattr(section, "seed", None)
        stages[kind.name] = kind(section, root=config.root, seed=config.seed if own_seed is None else own_seed)
    return stages


def fingerprints(stages: dict[str, Stage[Any]]) -> dict[str, str]:
    """Name the output of every stage; needs no stage to have run.

    Raises:
        InputError: if an input outside the store (a URL list, a weights file) is missing.
    """
    names: dict[str, str] = {}
    for name, stage in stages.items():
        names[name] = stage.fingerprint(names)
    return names


def inspect_all(stages: dict[str, Stage[Any]], names: dict[str, str]) -> dict[str, StageState]:
    """Say of every stage whether it is done and, if not, why it will run."""
    states: dict[str, StageState] = {}
    for name, stage in stages.items():
        pending = [upstream for upstream in stage.upstream if states[upstream].status == "pending"]
        if pending:
            found = Manifest.read(stage.root, name, names[name])
            reason = f"{', '.join(pending)} will run first" if found else "no result for these settings"
            states[name] = StageState(name=name, fingerprint=names[name], status="pending", reason=reason)
        else:
            inputs = {upstream: _manifest(states[upstream]) for upstream in stage.upstream}
            states[name] = inspect_stage(stage, names[name], inputs)
    return states


def _manifest(state: StageState) -> Manifest:
    assert state.manifest is not None, state.name
    return state.manifest
