"""The private Prefect server: shared while it is used, gone when it is not, its history kept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.flows import flow
from prefect.states import Running

from flows.prefect_server import PrivateServer, ServerError, answers, prefect_api, state_folder
from tests.conftest import free_port


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


def test_an_api_url_that_is_dead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{free_port()}/api"
    refused = pytest.raises(ServerError, match="start that server, or unset it")
    with temporary_settings({PREFECT_API_URL: url}), refused, prefect_api(None):
        pass


def test_state_folder_names_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefect

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "unclip" / f"prefect-{prefect.__version__}"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert not state_folder().is_relative_to(tmp_path)
