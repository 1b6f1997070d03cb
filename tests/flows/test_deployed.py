"""What the flows of a deployment do without a server that answers; with one: ``test_deployments.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.deployed import _look_at_lists, announced_uri
from flows.project import project_of
from stages import storage
from stages.config import check_config, load_config, to_values
from stages.errors import StageError
from tests.conftest import free_port

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


def test_lists_are_announced_only_where_the_event_arrives(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/a.png\n")
    source = f"source={{kind: urls, lists: [{tmp_path}/list.txt], caption_column: null}}"
    values = to_values(load_config(TINY, [f"root={tmp_path}/store", source]))
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        for _ in range(2):
            with pytest.raises(StageError, match=r"unclip\.lists\.changed: .* does not take the event .*says it again"):
                _look_at_lists(values, "lists")
        assert not list((tmp_path / "store").rglob("announced*"))
        # What one watch has said, another one on the same store has not.
        fingerprint = project_of(check_config(values)).states["source"].fingerprint
        storage.write_json(announced_uri(values["root"], "others/lists"), {"fingerprint": fingerprint})
        assert _look_at_lists(values, "others/lists") == []
        with pytest.raises(StageError, match="does not take the event"):
            _look_at_lists(values, "lists")
