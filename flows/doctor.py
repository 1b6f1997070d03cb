"""``unclip doctor``: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from flows.prefect_server import ServerError, api_url_origin, refuse_unreachable, state_folder, user_api_url
from stages import storage
from stages.config import Config
from stages.errors import UnclipError
from stages.executor import ClusterConfig
from stages.units import GIB

Level = Literal["ok", "advice", "problem"]

_DISTRIBUTION = "unclip-pipeline"
_MIN_MEMORY_GIB, _MIN_DISK_GIB, _MIN_SHM_GIB = 6.0, 5.0, 1.0
_COLOURS = {"ok": "green", "advice": "yellow", "problem": "red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``ok``; ``advice``: works, could be better; ``problem``: a run will fail.
        what: the thing.
        found: what was found.
        remedy: what to do about it; empty when ``ok``.
    """

    level: Level
    what: str
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def examine(config: Config | None = None) -> list[Finding]:
    """Look at everything a run needs.

    Args:
        config: its store and its cluster are tried too.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        check_packages,
        check_bytecode,
        lambda: check_hardware(config),
        check_gpus,
        check_loopback,
        check_prefect,
        lambda: check_ray(config),
    ]
    if config is not None:
        checks.append(lambda: check_store(config.root))
    return [finding for check in checks for finding in _guarded(check)]


def findings_table(findings: list[Finding]) -> Table:
    """Draw the findings."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("", "what", "found", "what to do"):
        table.add_column(name)
    for finding in findings:
        mark = f"[{_COLOURS[finding.level]}]{finding.level}[/]"
        table.add_row(mark, finding.what, finding.found, finding.remedy)
    return table


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that breaks is itself a finding."""
    try:
        yield from check()
    except Exception as error:
        name = getattr(check, "__name__", "check").removeprefix("check_")
        yield Finding(level="advice", what=name, found=f"could not be checked: {error}", remedy="look at it by hand")


def check_python() -> Iterator[Finding]:
    """Look at the interpreter."""
    wanted = importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    low, high = (tuple(int(part) for part in text.split(".")) for text in re.findall(r"[\d.]+", wanted)[:2])
    low, high = (low, high) if low < high else (high, low)
    if low <= sys.version_info[: len(low)] and sys.version_info[: len(high)] < high:
        yield Finding(level="ok", what="python", found=platform.python_version())
    else:
        yield Finding(
            level="problem",
            what="python",
            found=platform.python_version(),
            remedy=f"make the virtual environment with Python {wanted}",
        )


def check_packages() -> Iterator[Finding]:
    """Compare installed packages with the ranges this project supports."""
    from packaging.requirements import Requirement

    wrong: list[str] = []
    shown: list[str] = []
    for text in importlib.metadata.requires(_DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        if requirement.name in ("torch", "ray", "prefect", "deepspeed", "img2dataset"):
            shown.append(f"{requirement.name} {version}")
    if wrong:
        yield Finding(
            level="problem",
            what="packages",
            found="; ".join(wrong),
            remedy="install the pinned versions: pip install -r requirements.lock",
        )
    else:
        yield Finding(level="ok", what="packages", found=", ".join(shown))
    try:
        importlib.metadata.version("dataclasses")
    except importlib.metadata.PackageNotFoundError:
        return
    yield Finding(
        level="problem",
        what="packages",
        found="the ancient backport `dataclasses` is installed and breaks Prefect's server",
        remedy="pip uninstall dataclasses",
    )


def check_bytecode(package: str = "torch") -> Iterator[Finding]:
    """Look whether a large package is compiled: where it cannot be, every worker compiles it at every start."""
    spec = importlib.util.find_spec(package)
    source = spec.origin if spec is not None else None
    if source is None or Path(importlib.util.cache_from_source(source)).exists():
        yield Finding(level="ok", what="bytecode", found="compiled")
        return
    yield Finding(
        level="advice",
        what="bytecode",
        found=f"{package} is not compiled; every process that imports it takes seconds longer",
        remedy=f"{sys.executable} -m compileall -q {Path(source).parents[1]}",
    )


def check_hardware(config: Config | None) -> Iterator[Finding]:
    """Look at cores, memory, disk and shared memory."""
    import psutil

    cores = len(os.sched_getaffinity(0))
    yield Finding(
        level="ok" if cores >= 2 else "advice",
        what="cores",
        found=str(cores),
        remedy="" if cores >= 2 else "works, slowly; two or more are better",
    )
    memory = psutil.virtual_memory()
    yield _size(
        "memory", memory.available, memory.total, _MIN_MEMORY_GIB, "close other programs, or lower cluster.num_cpus"
    )
    places = {"disk, temporary files": Path(tempfile.gettempdir())}
    if config is not None and storage.is_local(config.root):
        places["disk, store"] = _existing(Path(config.root))
    for what, place in places.items():
        usage = shutil.disk_usage(place)
        yield _size(
            what, usage.free, usage.total, _MIN_DISK_GIB, f"free some space at {place}, or set TMPDIR or `root`"
        )
    shm = Path("/dev/shm")
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        wanted = max(_MIN_SHM_GIB, 1.2 * config.cluster.object_store_gib) if config is not None else _MIN_SHM_GIB
        remedy = "give more (container: --shm-size=2g), or lower cluster.object_store_gib; Ray uses slow files else"
        yield _size("/dev/shm", usage.free, usage.total, wanted, remedy, level="advice")


def _size(what: str, free: float, total: float, wanted_gib: float, remedy: str, level: Level = "problem") -> Finding:
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= wanted_gib * GIB:
        return Finding(level="ok", what=what, found=found)
    return Finding(level=level, what=what, found=found, remedy=f"{wanted_gib:g} GiB are needed: {remedy}")


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def check_gpus() -> Iterator[Finding]:
    """Look at GPUs, their driver, and whether torch can use them."""
    import torch

    tool = shutil.which("nvidia-smi")
    listed = ""
    if tool is not None:
        query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    if torch.cuda.is_available():
        yield Finding(level="ok", what="GPU", found="; ".join(listed.splitlines()) or torch.cuda.get_device_name(0))
    elif listed:
        yield Finding(
            level="problem",
            what="GPU",
            found=f"{'; '.join(listed.splitlines())}; torch {torch.__version__} cannot use it",
            remedy="install a torch build for this driver's CUDA version, or update the driver",
        )
    else:
        yield Finding(level="advice", what="GPU", found="none", remedy="fine for the quickstart; real models need GPUs")


def check_loopback() -> Iterator[Finding]:
    """See whether servers on loopback work: Ray, Prefect and the procedural data set need them."""
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.settimeout(5)
            client.connect(server.getsockname())
    except OSError as error:
        yield Finding(
            level="problem",
            what="ports",
            found=f"no connection over 127.0.0.1: {error}",
            remedy="allow loopback connections (firewall, sandbox)",
        )
        return
    yield Finding(level="ok", what="ports", found="loopback connections work")
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if os.environ.get(name)]
    exempt = os.environ.get("no_proxy", "") + os.environ.get("NO_PROXY", "")
    if proxies and "127.0.0.1" not in exempt:
        yield Finding(
            level="advice",
            what="ports",
            found=f"{proxies[0]} is set and does not exempt loopback",
            remedy="export no_proxy=127.0.0.1,localhost",
        )


def check_prefect() -> Iterator[Finding]:
    """See which Prefect API a run would use."""
    url = user_api_url()
    if not url:
        folder = state_folder()
        yield Finding(level="ok", what="prefect", found=f"a private server is started for a run; its state: {folder}")
        return
    try:
        refuse_unreachable(url)
    except ServerError as error:
        found, _, remedy = str(error).partition("; ")
        yield Finding(level="problem", what="prefect", found=found, remedy=remedy)
    else:
        yield Finding(level="ok", what="prefect", found=f"{api_url_origin()}: {url} answers")


def check_ray(config: Config | None) -> Iterator[Finding]:
    """See whether Ray starts, can be joined, or takes jobs."""
    from cluster.connection import connect
    from cluster.jobs import JobCluster

    cluster = config.cluster if config is not None else ClusterConfig(num_cpus=1, object_store_gib=0.1)
    if cluster.submit is None and cluster.executor == "local":  # a job runs on its cluster's Ray in any case
        yield Finding(level="ok", what="ray", found="not used: cluster.executor is `local`")
        return
    started_at = time.monotonic()
    try:
        if cluster.submit is not None:
            JobCluster(cluster.submit)
        else:
            connect(cluster).close()
    except UnclipError as error:
        yield Finding(level="problem", what="ray", found=str(error), remedy="see the message")
        return
    address = cluster.submit or cluster.address
    word = "starts" if address == "local" else f"at {address} answers"
    yield Finding(level="ok", what="ray", found=f"{word} ({time.monotonic() - started_at:.0f} s)")


def check_store(root: str) -> Iterator[Finding]:
    """Write to the store and read it back; look at the environment of S3."""
    if not storage.is_local(root):
        yield from _check_s3_environment()
    try:
        storage.check_writable(root)
    except UnclipError as error:
        yield Finding(level="problem", what="store", found=str(error), remedy="see the message")
        return
    yield Finding(level="ok", what="store", found=f"{root} can be written and read")


def _check_s3_environment() -> Iterator[Finding]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    yield Finding(level="ok", what="S3 endpoint", found=endpoint or "AWS's own (AWS_ENDPOINT_URL is not set)")
    has_keys = bool(os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"))
    has_profile = bool(os.environ.get("AWS_PROFILE")) or Path("~/.aws/credentials").expanduser().exists()
    if has_keys or has_profile:
        source = "AWS_ACCESS_KEY_ID" if has_keys else "AWS profile"
        yield Finding(level="ok", what="S3 credentials", found=f"from {source}")
    else:
        yield Finding(
            level="advice",
            what="S3 credentials",
            found="neither keys nor a profile in the environment",
            remedy="export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, unless this machine has a role of its own",
        )
