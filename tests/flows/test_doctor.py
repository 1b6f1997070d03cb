"""The doctor on this machine, which the test suite itself proves to be healthy, and on broken surroundings."""

from __future__ import annotations

import py_compile
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import doctor
from flows.doctor import Finding
from stages.config import load_config
from tests.conftest import free_port

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_healthy_machine_has_no_problems() -> None:
    for check in (doctor.check_python, doctor.check_packages, doctor.check_gpus, doctor.check_loopback):
        found = list(check())
        assert found and all(finding.level != "problem" for finding in found), found
    names = {finding.what for finding in doctor.check_hardware(None)}
    assert {"cores", "memory", "disk, temporary files"} <= names


def test_a_package_that_every_worker_would_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "large_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = only(doctor.check_bytecode("large_package"))
    assert found.level == "advice" and "-m compileall" in found.remedy
    py_compile.compile(str(tmp_path / "large_package.py"))
    assert only(doctor.check_bytecode("large_package")).level == "ok"


def test_every_finding_that_is_not_ok_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MIN_MEMORY_GIB", 1e6)
    monkeypatch.setattr(doctor, "_MIN_DISK_GIB", 1e6)
    found = {finding.what: finding for finding in doctor.check_hardware(None)}
    for what in ("memory", "disk, temporary files"):
        assert found[what].level == "problem" and "1e+06 GiB are needed" in found[what].remedy
    assert all(finding.remedy for finding in found.values() if finding.level != "ok")


def test_prefect_api_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert only(doctor.check_prefect()).level == "ok"
    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url}):  # Prefect has read its variables before
        dead = only(doctor.check_prefect())
    assert dead.level == "problem" and "unset it" in dead.remedy


def test_a_proxy_that_catches_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert any("no_proxy" in finding.remedy for finding in doctor.check_loopback())
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert only(doctor.check_loopback()).level == "ok"


def test_store(root: str) -> None:
    found = list(doctor.check_store(root))
    assert all(finding.level == "ok" for finding in found), found
    assert ("S3 endpoint" in {finding.what for finding in found}) == root.startswith("s3://")


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert only(doctor.check_store(str(tmp_path / "file" / "store"))).level == "problem"


def test_s3_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    found = {finding.what: finding for finding in doctor.check_store("s3://bucket/prefix")}
    assert found["S3 credentials"].level == "advice" and found["store"].level == "problem"


def test_a_check_that_breaks_is_a_finding() -> None:
    def check_nothing() -> Iterator[Finding]:
        yield Finding(level="ok", what="first", found="")
        raise RuntimeError("broken")

    first, second = doctor._guarded(check_nothing)
    assert first.what == "first" and second.what == "nothing" and "broken" in second.found


@pytest.mark.parametrize("executor", ["ray", "local"])
def test_a_cluster_that_takes_no_jobs(executor: str) -> None:
    """The cluster is asked, not a Ray of this machine."""
    submit = f"http://127.0.0.1:{free_port()}"
    config = load_config(TINY, ["root=nowhere", f"cluster.submit={submit}", f"cluster.executor={executor}"])
    found = only(doctor.check_ray(config))
    assert found.level == "problem" and f"cluster.submit: '{submit}'" in found.found and found.remedy


@pytest.mark.slow
def test_ray_starts() -> None:
    assert only(doctor.check_ray(None)).level == "ok"
