"""A driver that runs stages in forked children of itself, and has them killed where it is told.

Everything heavy is imported once. It reads one JSON object a line from standard input and answers with one a line:

    {"root": ..., "stage": ..., "kill": {"moment": ..., "kind": ..., "number": ...} | null, "max_file_bytes": n | null}
    {"status": exit code or minus the signal, "said": the error's text}
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import re
import resource
import signal
import sys
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import s3fs  # noqa: F401
import torch

import unclip_models.clip  # noqa: F401
from stages import storage
from stages.config import Config, load_config
from stages.errors import UnclipError
from stages.executor import LocalExecutor
from stages.graph import build_stages, fingerprints
from stages.img2dataset_unit import load_img2dataset
from stages.manifest import Manifest
from stages.runner import run_stage

IS_RECORD = re.compile(r"[^.]+\.json")  # a shard's files have a role in their name: <shard id>.card.json


def kind_of(uri: str) -> str:
    """Tell what is written: ``manifest``, ``table``, ``record`` or ``data``."""
    name = uri.rsplit("/", 1)[-1]
    if name in ("manifest.json", "shards.parquet"):
        return "manifest" if name == "manifest.json" else "table"
    return "record" if IS_RECORD.fullmatch(name) else "data"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str, kind: str, number: int) -> None:
    """Have this process killed at the ``number``-th publication of a ``kind``.

    Moments: ``writing``: half of the bytes are out; ``publishing``: all are, but the object is not in place, or the
    server's answer not read; ``published``: the object is in place.
    """
    original: Callable[[str, bytes], storage.Entry] = storage._publish
    count = 0

    def publish(uri: str, data: bytes) -> storage.Entry:
        nonlocal count
        count += kind_of(uri) == kind
        if count == number and kind_of(uri) == kind:
            if moment == "published":
                original(uri, data)
                die()
            part = data[: len(data) // 2] if moment == "writing" else data
            if not storage.is_local(uri):
                send_part(uri, data, part)
                die()
            if moment == "writing":
                storage._replace(uri, lambda file: write_and_die(file, part))
            Path.replace = lambda *arguments: die()  # type: ignore[assignment,method-assign,return-value]
        return original(uri, data)

    storage._publish = publish


def write_and_die(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    die()


def send_part(uri: str, data: bytes, part: bytes) -> None:
    """Announce a PUT of ``data`` and send only ``part`` of it; the answer is not read."""
    place = urllib.parse.urlsplit(storage._remote().sign(uri, client_method="put_object"))
    connection = http.client.HTTPConnection(place.netloc)
    connection.putrequest("PUT", f"{place.path}?{place.query}")
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders()
    connection.send(part)


def run(config: Config, order: dict[str, Any]) -> None:
    config = dataclasses.replace(config, root=order["root"])
    stages = build_stages(config)
    names = fingerprints(stages)
    stage = stages[order["stage"]]
    inputs = {up: Manifest.read(config.root, up, names[up]) for up in stage.upstream}
    found = {up: manifest for up, manifest in inputs.items() if manifest is not None}
    assert found.keys() == inputs.keys(), order
    if order.get("kill"):
        kill_at(**order["kill"])
    if order.get("max_file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_file_bytes"],) * 2)
    run_stage(stage, names[stage.name], found, LocalExecutor(), config.cluster)


def in_child(config: Config, order: dict[str, Any]) -> dict[str, Any]:
    """Run in a fork and wait for its end."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(config, order)
                code = 0
            except UnclipError as error:
                os.write(said.fileno(), f"{type(error).__name__}: {error}".encode())
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 3
            finally:
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return {"status": status, "said": said.read().decode()}


def main() -> None:
    config = load_config(Path(sys.argv[1]))
    load_img2dataset()
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(in_child(config, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
