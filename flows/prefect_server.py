"""Where the flow talks to Prefect: the user's own server, or a private one on loopback that needs no care.

A private server is one process per user and machine, shared by all runs that overlap, and gone about a second after the
last of them has ended, however it ended: every run holds a shared lock on a file, and the server stops when it can take
that lock alone. Its database stays in the user's state folder, so the history of runs is kept. Prefect's own ephemeral
mode does the same work with a start-up limit shorter than its migrations and with a traceback when the run ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from stages.errors import UnclipError, first_line

START_TIMEOUT_S = 180.0
_POLL_S = 0.1
_FLUSH_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 10.0
_STATE_NAME, _LOG_NAME = "server.json", "server.log"
# Three locks: held by every user (shared), by the user that looks for a server or starts one, by the server.
_USERS_NAME, _STARTER_NAME, _SERVER_NAME = "users.lock", "starter.lock", "server.lock"

# Nothing is sent home, no blocks are registered (we use none; it takes seconds), no web pages are served.
_SERVER_ENVIRONMENT = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "PREFECT_SERVER_UI_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


class ServerError(UnclipError):
    """Prefect cannot be reached or started."""


def state_folder() -> Path:
    """Return the folder of the private server: one per Prefect version, since their databases differ, and machine.

    Machines may share the home folder and its locks, but not the loopback on which the server listens. It lies in
    ``$XDG_STATE_HOME`` (default ``~/.local/state``), or in the temporary folder where that is not writable.
    """
    name = f"prefect-{importlib.metadata.version('prefect')}-{platform.node() or 'localhost'}"
    base = Path(os.environ.get("XDG_STATE_HOME") or _in_home(".local/state"))
    folder = base / "unclip" / name
    with contextlib.suppress(OSError):
        if base.is_absolute():  # it is not where the user has no home
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK):
                return folder
    folder = Path(tempfile.gettempdir()) / f"unclip-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ServerError(f"{folder}: belongs to another user; set XDG_STATE_HOME to a folder of yours")
    return folder


def _in_home(path: str) -> Path:
    """Return a path below the user's home; as it is, and so not absolute, where there is none."""
    with contextlib.suppress(RuntimeError):
        return Path("~", path).expanduser()
    return Path(path)


@dataclass(frozen=True)
class Api:
    """Address of a Prefect API.

    Attributes:
        url: such as ``http://127.0.0.1:4200/api``.
        auth: ``user:password`` of a private server; empty for the user's own (Prefect knows how to reach that).
    """

    url: str
    auth: str = ""


class PrivateServer:
    """A use of the private server; starting it returns at once, so that its 11 s pass while other things load."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or state_folder()
        self._users: IO[str] | None = None
        self._starter: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._launched = False

    def start(self) -> None:
        """Register as a user and launch the server unless one runs; do not wait for it."""
        if self._users is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._users = _locked(self.folder / _USERS_NAME, fcntl.LOCK_SH)
        self._starter = _locked(self.folder / _STARTER_NAME, fcntl.LOCK_EX)
        if not self._is_alive():
            (self.folder / _STATE_NAME).unlink(missing_ok=True)
            self._launch()

    def wait(self) -> Api:
        """Return the address once the server answers.

        Raises:
            ServerError: if it dies or does not answer within three minutes; names its log.
        """
        self.start()
        self._reap()
        deadline = time.monotonic() + START_TIMEOUT_S
        while (api := self._find()) is None:
            alive = self._is_alive()
            if not alive or time.monotonic() > deadline:
                what = f"is silent after {START_TIMEOUT_S:g} s" if alive else "ended while it started"
                raise ServerError(
                    f"the private Prefect server {what}; read {self.folder / _LOG_NAME}, or set PREFECT_API_URL to a "
                    "server of yours"
                )
            time.sleep(_POLL_S)
        _close(self._starter)
        return api

    def take_launched(self) -> bool:
        """Tell, once, whether this use has launched the server; then no other run was alive."""
        launched, self._launched = self._launched, False
        return launched

    def release(self) -> None:
        """Stop using the server; it ends by itself when nobody uses it any more."""
        self._reap()
        _close(self._starter)
        _close(self._users)
        self._users = None

    def __enter__(self) -> PrivateServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _is_alive(self) -> bool:
        """Tell whether a server process exists: it holds a lock from its first moment to its last."""
        with (self.folder / _SERVER_NAME).open("a") as probe:
            try:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _reap(self) -> None:
        """Collect the launcher, which ends as soon as its child, the server, holds the lock."""
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _find(self) -> Api | None:
        try:
            state = json.loads((self.folder / _STATE_NAME).read_text())
            api = Api(url=f"http://127.0.0.1:{state['port']}/api", auth=state["auth"])
        except (OSError, ValueError, KeyError):
            return None
        return api if answers(api.url) else None

    def _launch(self) -> None:
        self._launched = True
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        auth = f"unclip:{secrets.token_urlsafe(24)}"
        environment |= _SERVER_ENVIRONMENT | {
            "PREFECT_HOME": str(self.folder),
            "PREFECT_PROFILES_PATH": str(self.folder / "profiles.toml"),
            "PREFECT_SERVER_API_AUTH_STRING": auth,
            # The file that holds the user's own settings must not reach a server that is not the user's.
            "PREFECT_API_AUTH_STRING": auth,
        }
        # -P: the working folder is not on the import path, whatever lies there; a session of its own: Ctrl-C is ours.
        command = [sys.executable, "-P", "-m", "flows.prefect_server", str(self.folder)]
        with (self.folder / _LOG_NAME).open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Tell whether a Prefect API is alive at ``url``; a proxy set in the environment is not asked for loopback."""
    handlers = [urllib.request.ProxyHandler({})] if "//127.0.0.1" in url or "//localhost" in url else []
    try:
        with urllib.request.build_opener(*handlers).open(f"{url}/health", timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def user_api_url() -> str:
    """Return the address of the Prefect API that the user has chosen; empty if there is none.

    Prefect itself is asked, so that its variables, profiles, ``prefect.toml``, ``pyproject.toml`` and ``.env`` count as
    they do for its own commands. Importing it takes a second; that is saved where nothing can name an address.
    """
    if not _may_name_an_api():
        return ""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url or ""


def _may_name_an_api() -> bool:
    named = ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")
    if any(os.environ.get(name) for name in named):
        return True
    home = Path(os.environ.get("PREFECT_HOME") or _in_home(".prefect"))
    if Path("prefect.toml").is_file() or _mentions(Path("pyproject.toml"), "tool.prefect"):
        return True
    return any(_mentions(path, "prefect") for path in (Path(".env"), home / "profiles.toml"))


def _mentions(path: Path, word: str) -> bool:
    try:
        return word in path.read_text(errors="replace").lower()
    except OSError:
        return False


def api_url_origin() -> str:
    """Say where the address of the user's API comes from."""
    if os.environ.get("PREFECT_API_URL"):
        return "PREFECT_API_URL"
    from prefect.context import get_settings_context

    context = get_settings_context()
    if context.profile.settings and any(setting.name == "PREFECT_API_URL" for setting in context.profile.settings):
        return f"Prefect's profile '{context.profile.name}'"
    return "prefect.toml, pyproject.toml or .env in this folder"


def refuse_unreachable(url: str) -> None:
    """Make sure that the user's API answers, asked as Prefect's client asks: with its key, proxy and certificates.

    Raises:
        ServerError: if it does not, or refuses.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _ANSWER_TIMEOUT_S}),
        get_client(sync_client=True) as client,
    ):
        try:
            client.read_flows(limit=1)
        except Exception as error:  # of httpx, Prefect or pydantic, by what answers there
            refused = getattr(getattr(error, "response", None), "status_code", 0) in (401, 403)
            what = "refuses the key" if refused else "does not answer"
            remedy = "correct PREFECT_API_KEY or PREFECT_API_AUTH_STRING" if refused else "start that server"
            raise ServerError(
                f"{api_url_origin()}: the Prefect API at {url} {what} ({first_line(error)}); {remedy}, correct the "
                "address (`prefect config view` shows it), or unset it and a private server is used"
            ) from error


@contextlib.contextmanager
def prefect_api(server: PrivateServer | None) -> Iterator[Api]:
    """Give the API that the flow uses, with Prefect's client pointed at it.

    Args:
        server: a private server being started; ``None`` where the user has a server.

    Raises:
        ServerError: if the user's own server does not answer, or the private one cannot be started.
    """
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        get_current_settings,
        temporary_settings,
    )

    if server is None:
        api = Api(url=get_current_settings().api.url or "")
        refuse_unreachable(api.url)
        with _flushing():
            yield api
        return
    api = server.wait()
    settings = {
        PREFECT_API_URL: api.url,
        PREFECT_API_AUTH_STRING: api.auth,
        # Nobody watches the pulse there, and its thread holds a run's end up by a second.
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    with temporary_settings(settings), _flushing():
        if server.take_launched():
            _close_stale_runs()
        yield api


def _close_stale_runs() -> None:
    """Note the end of runs whose process was killed: Prefect would show them as running for ever."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Crashed

    unfinished = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING"]}}})
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=unfinished):
            client.set_flow_run_state(flow_run.id, Crashed(message="the process of this run was killed"), force=True)


@contextlib.contextmanager
def _flushing() -> Iterator[None]:
    """Send what Prefect's client still holds back before its server goes; left alone it complains at exit."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    try:
        yield
    finally:
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=_FLUSH_TIMEOUT_S)


# ---- the server process ---------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Run a server until nobody holds the lock on ``folder/users.lock``; the body of the private server's process."""
    alive = (folder / _SERVER_NAME).open("a")
    try:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # another one is quicker
    # The child is nobody's child: it may outlive the run that launched it, and it keeps the lock.
    if os.fork():
        os._exit(0)
    import socket

    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    state = {
        "port": listener.getsockname()[1],
        "auth": os.environ["PREFECT_SERVER_API_AUTH_STRING"],
    }
    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(config)
    threading.Thread(target=_stop_when_unused, args=(server, folder), daemon=True).start()
    _write_private(folder / _STATE_NAME, json.dumps(state))
    server.run(sockets=[listener])


def _stop_when_unused(server: Any, folder: Path) -> None:
    users = (folder / _USERS_NAME).open("a")
    while True:
        time.sleep(0.5)
        # A start-up is never cut short: it may be in the middle of a migration of the database.
        with contextlib.suppress(BlockingIOError):
            if server.started:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
    # From here until the process is gone the lock is held, so a new run waits, then starts a server of its own.
    (folder / _STATE_NAME).unlink(missing_ok=True)
    server.should_exit = True
    time.sleep(15.0)
    os._exit(0)


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _locked(path: Path, kind: int) -> IO[str]:
    file = path.open("a")
    fcntl.flock(file, kind)
    return file


def _close(file: IO[str] | None) -> None:
    if file is not None:
        file.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
