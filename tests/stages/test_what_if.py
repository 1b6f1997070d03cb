"""What other thresholds would keep, against a run that has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stages import storage
from stages.errors import ConfigError, InputError
from stages.manifest import Manifest
from stages.what_if import what_if
from tests.stages.data_run import run_data, serving, stages_of, write_list

NUM_ROWS = 20
BASE: Mapping[str, Mapping[str, Any]] = {"curate": {"keep_fraction": 0.75}, "filter": {"min_caption_length": 9}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, dict[str, Manifest]]]:
    """Run the data stages; captions of one digit are too short: ten samples are left, of which eight are kept."""
    folder = tmp_path_factory.mktemp("what_if")
    with serving() as server:
        write_list(folder / "lists" / "pairs.jsonl", [(server.url(i), f"picture{i}") for i in range(NUM_ROWS)])
        yield str(folder / "store"), folder / "lists", run_data(str(folder / "store"), folder / "lists", **BASE)


@pytest.mark.parametrize(
    "change",
    [
        {"curate": {"keep_fraction": 0.4}},
        {"curate": {"keep_fraction": 1.0}},
        {"curate": {"keep_fraction": 0.75, "clip_score_min": 0.45}},
        {"filter": {"min_caption_length": 9, "caption_blocklist": ("picture1[0-4]",)}},
    ],
)
def test_it_says_what_a_run_would_do(place: tuple[str, Path, dict[str, Manifest]], change: dict[str, Any]) -> None:
    root, lists, manifests = place
    before = storage.list_files(root)
    found = what_if(stages_of(root, lists, **BASE), stages_of(root, lists, **{**BASE, **change}), manifests)
    assert storage.list_files(root) == before
    really = run_data(root, lists, **{**BASE, **change})
    assert found.kept == (manifests["curate"].num_kept, really["curate"].num_kept) and found.not_embedded == 0
    assert found.gained - found.lost == found.kept[1] - found.kept[0] != 0
    for name in ("filter", "curate"):
        now = {reason: counts[0] for reason, counts in found.dropped[name].items() if counts[0]}
        then = {reason: counts[1] for reason, counts in found.dropped[name].items() if counts[1]}
        assert (now, then) == (manifests[name].dropped, really[name].dropped)


def test_samples_without_embedding_are_told_apart(place: tuple[str, Path, dict[str, Manifest]]) -> None:
    root, lists, manifests = place
    loose = stages_of(root, lists, **{**BASE, "filter": {"min_caption_length": 1}})
    found = what_if(stages_of(root, lists, **BASE), loose, manifests)
    assert found.not_embedded == 10 and found.kept == (8, 8)
    assert found.dropped["filter"]["caption_too_short"] == (10, 0)


def test_other_measurements_need_a_run(place: tuple[str, Path, dict[str, Manifest]]) -> None:
    root, lists, manifests = place
    as_it_is = stages_of(root, lists, **BASE)
    with pytest.raises(ConfigError, match="touches what download measures or makes"):
        what_if(as_it_is, stages_of(root, lists, **{**BASE, "download": {"image_size_px": 64}}), manifests)
    with pytest.raises(InputError, match="embed has not finished"):
        what_if(as_it_is, as_it_is, {name: manifests[name] for name in ("source", "download", "filter")})
