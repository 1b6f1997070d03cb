"""Secrets are hidden in texts and refused in settings."""

from __future__ import annotations

import traceback

import pytest

from stages.config import load_config
from stages.errors import ConfigError, ShardError, StorageError
from stages.redaction import HIDDEN, errors_without_secrets, hide_secrets

QUICKSTART = "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("SOME_TOKEN", "wJalrXUtnFEMI/K7MDENG-and-more")
    monkeypatch.setenv("SHORT_PASSWORD", "abc")
    monkeypatch.setenv("HARMLESS", "harmless value")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key wJalrXUtnFEMI/K7MDENG is wrong", f"key {HIDDEN} is wrong"),
        ("wJalrXUtnFEMI/K7MDENG-and-more", HIDDEN),
        ("cannot read https://ann:s3cret@host:9/x?y@z", f"cannot read https://{HIDDEN}@host:9/x?y@z"),
        ("http://host/a:b@c, abc, harmless value", "http://host/a:b@c, abc, harmless value"),
    ],
)
def test_hide_secrets(text: str, expected: str) -> None:
    assert hide_secrets(text) == expected
    assert hide_secrets(expected) == expected


@pytest.mark.parametrize("value", ["s3://bucket/wJalrXUtnFEMI/K7MDENG", "https://ann:s3cret@host/lists"])
def test_a_setting_that_holds_a_secret_is_refused_without_telling_it(value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(QUICKSTART, [f"source={{kind: urls, lists: ['{value}']}}"])
    assert "source.lists: holds a password or key" in str(raised.value)
    assert "s3cret" not in str(raised.value) and "wJalr" not in str(raised.value)


class Worded(Exception):
    """Writes a text that is not made of its arguments."""

    def __str__(self) -> str:
        return "refused: wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ShardError("key wJalrXUtnFEMI/K7MDENG", retryable=True), ShardError, f"key {HIDDEN}"),
        (FileNotFoundError(2, "none", "/wJalrXUtnFEMI/K7MDENG"), FileNotFoundError, f"[Errno 2] none: '/{HIDDEN}'"),
        (OSError("no such file"), OSError, "no such file"),
        (KeyError("wJalrXUtnFEMI/K7MDENG"), KeyError, f"'{HIDDEN}'"),
        (Worded(), RuntimeError, f"Worded: refused: {HIDDEN}"),
    ],
)
def test_an_error_loses_its_secrets_and_keeps_its_type(error: Exception, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as raised, errors_without_secrets():
        raise error
    assert type(raised.value) is kind and str(raised.value) == text
    assert getattr(error, "retryable", True)


def test_what_led_to_an_error_loses_its_secrets_too() -> None:
    with pytest.raises(StorageError) as raised, errors_without_secrets():
        try:
            raise OSError("http://ann:s3cret@host/ says no") from ValueError("wJalrXUtnFEMI/K7MDENG")
        except OSError as error:
            error.add_note("it was wJalrXUtnFEMI/K7MDENG")
            raise StorageError("cannot write") from error
    chain = "".join(line for line in traceback.format_exception(raised.value) if not line.startswith("  File"))
    assert f"OSError: http://{HIDDEN}@host/ says no" in chain and f"it was {HIDDEN}" in chain
    assert f"ValueError: {HIDDEN}" in chain
