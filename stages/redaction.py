"""Secrets stay out of what is kept: settings that hold one are refused, and texts lose them before they are written.

A secret is the value of an environment variable whose name says so, or the user and password of a URL.
"""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def errors_without_secrets() -> Iterator[None]:
    """Take the secrets out of what a ``with`` block raises, and of what led to it, before somebody else keeps it.

    Raises:
        BaseException: what the block raised; a ``RuntimeError`` in its place where its text cannot be changed.
    """
    try:
        yield
    except BaseException as error:
        clean = without_secrets(error)
        if clean is error:
            raise
        raise clean from None


def without_secrets(error: BaseException) -> BaseException:
    """Take the secrets out of an error and out of its causes; return it, since whoever decides by its type still can.

    Returns:
        The same error, or a ``RuntimeError`` with its text where that is not made of its arguments.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            waiting += [link.__cause__, link.__context__]
            _clean(link)
    text = str(error)
    if hide_secrets(text) == text:
        return error
    return RuntimeError(f"{type(error).__name__}: {hide_secrets(text)}")


def _clean(error: BaseException) -> None:
    error.args = tuple(hide_secrets(item) if isinstance(item, str) else item for item in error.args)
    if isinstance(error, OSError):  # it keeps copies of its arguments, and writes its text from those
        for name in ("strerror", "filename", "filename2"):
            if isinstance(text := getattr(error, name), str):
                setattr(error, name, hide_secrets(text))
    if notes := getattr(error, "__notes__", None):
        error.__notes__ = [hide_secrets(note) for note in notes]


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
