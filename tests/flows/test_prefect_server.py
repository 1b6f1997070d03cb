"""The private Prefect server: shared while it is used, gone when it is not, its history kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.flows import flow
from prefect.states import Running

from flows.prefect_server import PrivateServer, ServerError, answers, prefect_api, state_folder
from tests.conftest import free_port

TOP = Path(__file__).parents[2]


@flow(name="empty")
def empty() -> int:
    return 1


def until_gone(url: str, timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not answers(url)


@pytest.mark.slow
def test_life_of_a_private_server(tmp_path: Path) -> None:
    with PrivateServer(tmp_path) as first:
        url = first.wait().url
        with PrivateServer(tmp_path) as second:
            assert second.wait().url == url, "two runs at once share one server"
            with prefect_api(second):
                assert empty() == 1
                with get_client(sync_client=True) as client:
                    killed = client.create_flow_run(empty, name="killed", state=Running())
        time.sleep(1.5)
        assert answers(url), "it stays as long as somebody uses it"
    assert until_gone(url)
    with PrivateServer(tmp_path) as third, prefect_api(third), get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
        assert len(runs) == 2, "the history is kept"
        assert client.read_flow_run(killed.id).state_name == "Crashed"


def test_a_server_that_cannot_start_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefect.db").mkdir()
    with PrivateServer(tmp_path) as server, pytest.raises(ServerError, match=r"server\.log"):
        server.wait()


# ---- the user's own server ------------------------------------------------------------------------------------------


def asked(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of Python in a folder, as a user with a home of her own and nothing of Prefect in the environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    path = os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = inherited | {"HOME": str(folder / "home"), "PYTHONPATH": path} | variables
    line = [sys.executable, "-c", code]
    return subprocess.run(line, env=given, cwd=folder, capture_output=True, text=True, timeout=60)


PROFILES = """active = "mine"
[profiles.mine]
PREFECT_API_URL = "http://profile.example/api"
[profiles.other]
PREFECT_API_URL = "http://other.example/api"
[profiles.none]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        ({}, {}, ""),
        ({}, {"PREFECT_API_URL": "http://variable.example/api"}, "http://variable.example/api"),
        ({"home/.prefect/profiles.toml": PROFILES}, {}, "http://profile.example/api"),
        ({"home/.prefect/profiles.toml": PROFILES}, {"PREFECT_PROFILE": "other"}, "http://other.example/api"),
        ({"home/.prefect/profiles.toml": PROFILES}, {"PREFECT_PROFILE": "none"}, ""),
        ({"elsewhere/profiles.toml": PROFILES}, {"PREFECT_HOME": "elsewhere"}, "http://profile.example/api"),
        ({"p.toml": PROFILES}, {"PREFECT_PROFILES_PATH": "p.toml"}, "http://profile.example/api"),
        ({"prefect.toml": '[api]\nurl = "http://file.example/api"\n'}, {}, "http://file.example/api"),
        (
            {"pyproject.toml": '[tool.prefect.api]\nurl = "http://project.example/api"\n'},
            {},
            "http://project.example/api",
        ),
        ({".env": "PREFECT_API_URL=http://dot.example/api\n"}, {}, "http://dot.example/api"),
    ],
    ids=lambda value: "+".join([*value]) if isinstance(value, dict) else None,
)
def test_the_users_server_is_found_as_prefect_finds_it(
    tmp_path: Path, files: dict[str, str], variables: dict[str, str], expected: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    ours = "import sys; from flows.prefect_server import user_api_url; print(user_api_url(), 'prefect' in sys.modules)"
    found = asked(tmp_path, ours, **variables)
    url, _, asked_prefect = found.stdout.strip().rpartition(" ")
    assert (url, found.returncode) == (expected, 0), found.stderr
    assert (asked_prefect == "True") is bool(files or variables), "Prefect is asked where something may name a server"


@pytest.mark.slow
def test_prefects_own_commands_choose_the_server(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()

    def prefect(*words: str) -> str:
        command = ["prefect", *words]
        return asked(tmp_path, f"import sys; sys.argv = {command!r}; from prefect.cli import app; app()").stdout

    prefect("config", "set", "PREFECT_API_URL=http://127.0.0.1:4200/api")
    found = asked(tmp_path, "from flows.prefect_server import user_api_url; print(user_api_url())")
    assert found.stdout.strip() == "http://127.0.0.1:4200/api"
    assert "PREFECT_API_URL='http://127.0.0.1:4200/api'" in prefect("config", "view")


@pytest.mark.slow
def test_a_server_that_is_dead_is_refused_with_where_it_was_named(tmp_path: Path) -> None:
    (tmp_path / "home" / ".prefect").mkdir(parents=True)
    url = f"http://127.0.0.1:{free_port()}/api"
    (tmp_path / "home" / ".prefect" / "profiles.toml").write_text(
        f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{url}"\n'
    )
    config, store = str(TOP / "configs" / "quickstart.yaml"), f"root={tmp_path / 'store'}"
    line = ["run", config, "-s", store, "-s", "cluster.executor=local", "--only", "source"]
    ended = asked(tmp_path, f"import sys; from flows.cli import main; sys.exit(main({line!r}))")
    assert ended.returncode == 1
    assert ended.stderr.count("unclip:") == 1 and "Traceback" not in ended.stderr
    assert f"Prefect's profile 'mine': the Prefect API at {url} does not answer" in ended.stderr
    assert "start that server" in ended.stderr
    assert not (tmp_path / "home" / ".local").exists(), "no private server was started beside it"


def test_state_folder_is_of_one_version_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefect

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for node in ("one", "other"):  # with one home: a server on the loopback of the other is out of reach
        monkeypatch.setattr("platform.node", lambda node=node: node)
        assert state_folder() == tmp_path / "unclip" / f"prefect-{prefect.__version__}-{node}"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert not state_folder().is_relative_to(tmp_path)


def test_a_user_without_a_home_has_a_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container whose user is a mere number."""
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", _no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert state_folder().parent == tmp_path


def _no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")
