"""A store whose writes can be conditional: a disk, and S3 behind a proxy that heeds the conditions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stages.conditional_s3 import conditional_proxy


@pytest.fixture(scope="session")
def conditional_server(s3_server: str) -> Iterator[str]:
    """Serve the session's S3 with conditional writes; yield the endpoint."""
    with conditional_proxy(s3_server) as endpoint:
        yield endpoint


@pytest.fixture(params=["local", "s3"])
def atomic_root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give an empty store whose writes can be conditional."""
    if request.param == "local":
        return str(tmp_path / "store")
    root = str(request.getfixturevalue("s3_root"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("conditional_server"))
    return root
