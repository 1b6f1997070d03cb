"""A real Prefect server and a real worker, each a process of its own, for the drills of deployments."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil

from flows.prefect_server import answers
from tests.conftest import free_port

TOP = Path(__file__).parents[2]
_QUICK = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",  # ten seconds are not enough where trainings take every core
    "PREFECT_LOGGING_LEVEL": "WARNING",
}


def environment(home: Path, url: str) -> dict[str, str]:
    """Return the environment of everybody who uses that server."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    path = os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])])
    return inherited | _QUICK | {"PREFECT_HOME": str(home), "PREFECT_API_URL": url, "PYTHONPATH": path}


@contextlib.contextmanager
def running_server(home: Path, *, ui: bool = False, **variables: str) -> Iterator[str]:
    """Run a server; yield the address of its API."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = (home / "server.log").open("wb")
    given = environment(home, url) | variables
    process = subprocess.Popen(command if ui else [*command, "--no-ui"], env=given, stdout=log, stderr=log)
    try:
        eventually(lambda: answers(url), 90, f"the server of {home}")
        yield url
    finally:
        end(process)
        log.close()


@contextlib.contextmanager
def running_database() -> Iterator[dict[str, str]]:
    """Run a PostgreSQL if one is installed; yield the variables that point Prefect's server at it.

    A server with deployments should have one: on SQLite it now and then locks itself out of its database for minutes.
    """
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not binaries:
        yield {}
        return
    # It refuses to run as root, and a folder of pytest's is closed to everybody else.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="unclip-postgres-") as folder, open(os.devnull, "wb") as log:
        if user is not None:
            shutil.chown(folder, user)
        data, port = f"{folder}/data", str(free_port())
        tools = binaries[-1]
        given: dict[str, Any] = {"cwd": folder, "user": user, "stdout": log, "stderr": log}
        make = [tools / "initdb", "--pgdata", data, "--username", "prefect", "--auth", "trust", "--no-sync"]
        subprocess.run(make, check=True, **given)
        serve = [tools / "postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", "", "-c", "fsync=off"]
        process = subprocess.Popen(serve, **given)
        try:
            ready = [tools / "pg_isready", "-q", "-h", "127.0.0.1", "-p", port]
            eventually(lambda: subprocess.run(ready).returncode == 0, 60, "PostgreSQL")
            address = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
            yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": address}
        finally:
            process.send_signal(signal.SIGINT)  # "fast": clients that are left do not keep it
            process.wait(timeout=60)


@contextlib.contextmanager
def running_worker(home: Path, url: str, pool: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker of a pool."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    log = (home / "worker.log").open("wb")
    worker = subprocess.Popen(command, env=environment(home, url) | variables, stdout=log, stderr=log, cwd=home)
    try:
        yield worker
    finally:
        end(worker)
        log.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        left = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def eventually(found: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Wait until there is something true to return."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what}: nothing after {timeout_s:g} s")


def marked(name: str, value: str) -> list[psutil.Process]:
    """Return the living processes that have this variable in their environment."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(psutil.Error):
            if process.info["status"] != psutil.STATUS_ZOMBIE and process.environ().get(name) == value:
                found.append(process)
    return found


@contextlib.contextmanager
def listening_webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve an address that remembers the JSON that is sent to it."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", seen
        server.shutdown()
