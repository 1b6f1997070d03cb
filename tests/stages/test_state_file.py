"""State files: whatever the pieces they are read in, all of them comes, and what is not what was written is known."""

from __future__ import annotations

import tempfile
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages import state_file, storage
from stages.errors import IntegrityError, NotFoundError
from stages.state_file import StateFile, write_state
from tests.s3_forwarding import ForwardingHandler, serving

TENSORS = {
    "param/body.0.weight/0": torch.arange(7.0),
    "param/body.0.weight/100": torch.arange(50.0, 53.0),
    "ema/bias/4": torch.tensor([0.5]),
    "exp_avg/nothing/0": torch.empty(0),
    "exp_avg/bias/4": torch.arange(1000.0),
}


@pytest.fixture
def stored(root: str, tmp_path: Path) -> StateFile:
    """Put a state file on disk, and on S3."""
    write_state(tmp_path / "state", TENSORS, {"num_updates": "3"})
    uri = storage.join(root, "rank-0000.safetensors")
    return StateFile(uri, storage.upload(tmp_path / "state", uri))


def read(file: StateFile) -> dict[str, Tensor]:
    """Read a file whole; checks the count and the metadata."""
    parts: dict[tuple[str, str, int], Tensor] = {}

    def take(kind: str, name: str, start: int, values: Tensor) -> int:
        parts[kind, name, start] = values
        return len(values)

    assert file.read(take) == (sum(map(len, TENSORS.values())), {"num_updates": "3"})
    found: dict[str, Tensor] = {}
    for stretch in file.stretches():
        places = range(stretch.start, stretch.start + stretch.end - stretch.begin)
        own = [
            values
            for (kind, name, start), values in parts.items()
            if (kind, name) == (stretch.kind, stretch.name) and start in places
        ]
        found[f"{stretch.kind}/{stretch.name}/{stretch.start}"] = torch.cat([torch.empty(0), *own])
    return found


@pytest.mark.parametrize("piece_bytes", [4, 12, 40, 1 << 24])
def test_all_of_a_file_comes_in_order(stored: StateFile, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(state_file, "_PIECE_BYTES", piece_bytes)
    if piece_bytes < 40 and not storage.is_local(stored.uri):
        pytest.skip("hundreds of requests")
    found = read(stored)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], values) for key, values in TENSORS.items())


def test_nothing_is_copied_to_a_local_folder(
    stored: StateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's file may be larger than the disk of its machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    assert read(stored).keys() == TENSORS.keys()


@pytest.mark.parametrize("position", [3, 40, -3])
def test_a_changed_byte_is_noticed(stored: StateFile, position: int) -> None:
    content = bytearray(storage.read_bytes(stored.uri))
    content[position] ^= 1
    storage.write_bytes(stored.uri, bytes(content))
    with pytest.raises(IntegrityError, match=r"rank-0000.safetensors: differs from its record"):
        stored.read(lambda *_: 0)


@pytest.mark.parametrize("kept", [0, 5, 100, -4, -1])
def test_a_shortened_file_is_noticed(stored: StateFile, kept: int) -> None:
    storage.write_bytes(stored.uri, storage.read_bytes(stored.uri)[:kept])
    with pytest.raises(IntegrityError, match=r"rank-0000.safetensors: differs from its record"):
        stored.read(lambda *_: 0)


def test_a_file_that_is_not_there_is_not_damaged(stored: StateFile) -> None:
    storage.delete(stored.uri)
    with pytest.raises(NotFoundError):
        stored.read(lambda *_: 0)


@contextmanager
def spoiling(endpoint: str, asked: range) -> Iterator[str]:
    """Serve ``endpoint``, the last byte changed in those of the answers that are counted in ``asked``."""
    count = iter(range(1000))

    class Handler(ForwardingHandler):
        target = urllib.parse.urlsplit(endpoint).netloc

        def do_GET(self) -> None:
            answer = self.forward(self.body())
            if self.command == "GET" and next(count) in asked:
                answer = answer._replace(content=answer.content[:-1] + bytes([answer.content[-1] ^ 1]))
            self.answer(answer)

    with serving(Handler) as address:
        yield address


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_what_was_spoiled_on_its_way_is_read_again(
    s3_root: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: int
) -> None:
    """The size of the head, the head and the numbers, each once; counted once all the same."""
    write_state(tmp_path / "state", TENSORS, {"num_updates": "3"})
    uri = storage.join(s3_root, "rank-0000.safetensors")
    stored = StateFile(uri, storage.upload(tmp_path / "state", uri))
    with spoiling(s3_server, range(spoiled, spoiled + 1)) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert torch.equal(read(stored)["exp_avg/bias/4"], TENSORS["exp_avg/bias/4"])
    with spoiling(s3_server, range(1000)) as endpoint, pytest.raises(IntegrityError, match="it is damaged"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        stored.read(lambda *_: 0)
