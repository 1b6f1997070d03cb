"""The quickstart's config with changes, for tests of settings."""

from __future__ import annotations

from pathlib import Path

from stages.config import Config, load_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def quickstart(*changes: str) -> Config:
    """Load it; each change is a ``dotted.key=value``."""
    return load_config(QUICKSTART, ["root=nowhere/at-all", *changes])
