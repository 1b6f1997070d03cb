"""Secrets stay out of what is kept: settings that hold one are refused, and texts lose them before they are written.

A secret is the value of an environment variable whose name says so, or the user and password of a URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stages.errors import ConfigError

HIDDEN = "***"
_TELLING_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY|AUTH_STRING", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@'\"]+:[^/\s@'\"]*@")
_MIN_LENGTH = 8  # a shorter value would blot out words


def hide_secrets(text: str) -> str:
    """Return a text with every secret of this process's environment, and those of URLs, replaced by stars."""
    for value in _secrets():
        text = text.replace(value, HIDDEN)
    return _USER_OF_URL.sub(f"{HIDDEN}@", text)


def refuse_secrets(values: Mapping[str, Any]) -> None:
    """Refuse settings that hold a secret: they would end up in manifests and in reports.

    Raises:
        ConfigError: names the setting, not the value.
    """
    secrets = _secrets()
    for path, text in _texts(values, ""):
        if _USER_OF_URL.search(text) or any(secret in text for secret in secrets):
            raise ConfigError(
                f"{path}: holds a password or key; settings are kept in manifests and reports, so give it by the "
                "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...) and remove it here"
            )


def _secrets() -> list[str]:
    """Return the secrets of the environment, the longest first: one may be a part of another."""
    found = {
        value.strip()
        for name, value in os.environ.items()
        if _TELLING_NAME.search(name) and len(value.strip()) >= _MIN_LENGTH
    }
    return sorted(found, key=lambda value: (-len(value), value))


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, path)
