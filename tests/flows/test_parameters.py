"""The form of a deployment: every shipped config passes it, every setting is explained, mistakes do not pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.schema_tools.validation import is_valid_schema, validate

from flows.parameters import run_schema, watch_schema
from stages.config import load_config, settings, to_values

CONFIGS = [path for path in Path("configs").glob("*.yaml") if path.stem not in ("ablation", "prices")]
SCHEMA = run_schema()


def values(path: Path = CONFIGS[0]) -> dict[str, Any]:
    return to_values(load_config(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_pass(path: Path) -> None:
    is_valid_schema(SCHEMA)
    assert validate({"config": values(path), "name": path.stem, "until": "clip", "force": ["clip"]}, SCHEMA) == []
    assert validate({"config": values(path), "name": path.stem}, watch_schema()) == []


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"seed": "three"}, "config.seed"),
        ({"seed": True}, "config.seed"),
        ({"root": None}, "config.root"),
        ({"learning_rate": 1.0}, "config"),
        ({"cluster": {"executor": "slurm"}}, "config.cluster.executor"),
        ({"pca": {"num_bukets": 3}}, "config.pca"),
    ],
)
def test_mistakes_do_not_pass(change: dict[str, Any], place: str) -> None:
    (error,) = validate({"config": values() | change}, SCHEMA)
    assert error.json_path == f"$.{place}", error.message
    assert validate({"config": values(), "unti": "clip"}, SCHEMA)
    assert validate({"config": values(), "until": "upsampler-256"}, SCHEMA)


def test_every_setting_is_explained() -> None:
    config = SCHEMA["definitions"]["Config"]
    top = [info for info in settings() if "." not in info.path]
    assert set(config["properties"]) == {info.path for info in top}
    for info in top:
        assert config["properties"][info.path]["description"] == info.help
    named = [section for section in SCHEMA["definitions"].values() if "properties" in section]
    assert all(section["additionalProperties"] is False for section in named)
    assert all(schema.get("description") for section in named for schema in section["properties"].values())
