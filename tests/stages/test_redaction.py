"""Secrets are hidden in texts and refused in settings."""

from __future__ import annotations

import pytest

from stages.config import load_config
from stages.errors import ConfigError
from stages.redaction import HIDDEN, hide_secrets

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
