"""Fixtures shared by all tests: a real S3 server on loopback, and a store on it or on disk."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Set before any library that phones home, or that starts as many threads as there are cores, is imported.
os.environ |= {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "disabled",
}

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import hypothesis
import pytest

# The same examples at every run; `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

S3_ACCESS_KEY, S3_SECRET_KEY = "test-access-key", "test-secret-key"


def free_port() -> int:
    """Return a loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rclone() -> str:
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    assert found, "rclone is not installed; run `make setup`"
    return found


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """Take back what commands called in this process, by a test or a fixture of its module, set for the process."""
    _forget_console()
    yield
    _forget_console()


def _forget_console() -> None:
    from flows.logs import PACKAGES, ConsoleHandler

    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, ConsoleHandler):
            root.removeHandler(handler)
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a real S3 server for the session and yield its endpoint."""
    folder = tmp_path_factory.mktemp("s3")
    os.environ["TEST_S3_FOLDER"] = str(folder)  # for tests that look at the store from behind
    with serving_s3(folder) as endpoint:
        yield endpoint


@contextmanager
def serving_s3(folder: Path) -> Iterator[str]:
    """Run a real S3 server over a folder, with an empty ``bucket``; yields its endpoint."""
    (folder / "bucket").mkdir()
    port = free_port()
    log = folder.with_name(f"{folder.name}.log").open("wb")
    command = [_rclone(), "serve", "s3", "--auth-key", f"{S3_ACCESS_KEY},{S3_SECRET_KEY}", str(folder)]
    process = subprocess.Popen([*command, "--addr", f"127.0.0.1:{port}"], stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait_for(endpoint)
        yield endpoint
    finally:
        process.terminate()
        process.wait(timeout=20)
        log.close()


def _wait_for(endpoint: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
        except urllib.error.HTTPError:
            return  # it answers: an unsigned request is refused
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"no S3 server at {endpoint}")


@pytest.fixture
def s3_root(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Give an empty store on the S3 server, credentials in the environment."""
    for name, value in s3_environment(s3_server).items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return the environment that a client of the test server needs."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": S3_ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": "127.0.0.1,localhost",
    }


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give an empty store, on disk and on S3 in turn."""
    if request.param == "local":
        return str(tmp_path / "store")
    return str(request.getfixturevalue("s3_root"))


@pytest.fixture(scope="session")
def prefect_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep a private Prefect server for the session; yield the XDG_STATE_HOME with which a run finds it."""
    from flows.prefect_server import PrivateServer, state_folder

    home = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home))
        folder = state_folder()
    with PrivateServer(folder) as server:
        server.wait()
        yield home
