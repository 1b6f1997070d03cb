"""The form of a deployment: the config's schema, with our help texts, as Prefect shows and enforces it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from flows.config_reference import setting_help
from stages.config import Config, dataclasses_in, json_schema
from stages.graph import STAGE_NAMES

_DEFINITIONS = "#/definitions/"
_OVERRIDES = {
    "title": "overrides",
    "description": "settings to change, as `-s` takes them: decoder.num_steps=100",
    "type": "array",
    "items": {"type": "string"},
    "default": [],
}


def run_schema() -> dict[str, Any]:
    """Describe the parameters of the flow that runs a project, as JSON schema."""
    stage = {"anyOf": [{"type": "string", "enum": list(STAGE_NAMES)}, {"type": "null"}], "default": None}
    return _schema(
        {
            "overrides": _OVERRIDES,
            "start": {"title": "start", "description": "leave out the stages before it", **stage},
            "until": {"title": "until", "description": "leave out the stages after it", **stage},
            "only": {"title": "only", "description": "this stage alone", **stage},
            "force": {
                "title": "force",
                "description": "stages to run anew even if they are done",
                "type": "array",
                "items": {"type": "string", "enum": list(STAGE_NAMES)},
                "default": [],
            },
        }
    )


def retrain_schema() -> dict[str, Any]:
    """Describe the parameters of the flow that retrains a project, as JSON schema."""
    return _schema(
        {
            "overrides": _OVERRIDES,
            "promote": {
                "title": "promote",
                "description": "put into production what the gate lets pass",
                "type": "boolean",
                "default": True,
            },
            "from_scratch": {
                "title": "from_scratch",
                "description": "train from random weights, not from those in production",
                "type": "boolean",
                "default": False,
            },
        }
    )


def watch_schema() -> dict[str, Any]:
    """Describe the parameters of the flow that watches the lists, as JSON schema."""
    return _schema({})


def _schema(further: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    config = json_schema(definitions=_DEFINITIONS)
    definitions = config.pop("$defs")
    classes = _classes(Config)
    for name, section in {**definitions, "Config": config}.items():
        _describe(section, classes[name])
    properties: dict[str, dict[str, Any]] = {
        "name": {"title": "name", "description": "of the config, shown and recorded", "type": "string"},
        **{name: dict(schema) for name, schema in further.items()},
        "config": {"title": "config", "allOf": [{"$ref": f"{_DEFINITIONS}Config"}]},
    }
    for position, schema in enumerate(properties.values()):
        schema["position"] = position
    return {
        "title": "Parameters",
        "type": "object",
        "properties": properties,
        "required": ["config"],
        "additionalProperties": False,
        "definitions": {**definitions, "Config": config},
    }


def _describe(section: dict[str, Any], kind: type[Any]) -> None:
    """Give the settings of one class our names and help texts, in the order of the class."""
    for position, field in enumerate(dataclasses.fields(kind)):
        schema = section["properties"][field.name]
        schema |= {"title": field.name, "position": position}
        if text := setting_help(kind, field):
            schema["description"] = text
        if "$ref" in schema:  # what stands beside a reference is not read by all
            schema["allOf"] = [{"$ref": schema.pop("$ref")}]


def _classes(kind: type[Any]) -> dict[str, type[Any]]:
    """Return the class and all it holds, by name."""
    found = {kind.__name__: kind}
    for hint in typing.get_type_hints(kind).values():
        for nested in _nested(hint):
            found |= _classes(nested)
    return found


def _nested(hint: Any) -> list[type[Any]]:
    return dataclasses_in(hint) or [kind for part in typing.get_args(hint) for kind in _nested(part)]
