"""The desk at which the documents' commands are tried: a small run that is finished, and what the pages speak of.

``configs/quickstart.yaml`` is the quickstart with few steps, so that what a page says of it can be done as it stands;
``config.yaml`` is what pages call CONFIG. Its pipeline has been run three times; the versions 1 to 3 are promoted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows.cli import main
from stages import shapes
from tests.conftest import free_port
from tests.stages.data_run import Pictures, serving, write_list
from tests.stages.small_store import SHAPES
from tests.stages.test_adopt import MAKE

TOP = Path(__file__).parents[1]
WEEKS = {"2026-11-01": range(0, 48), "2026-11-08": range(48, 72)}
_STEPS = {"num_steps": 2, "warmup_steps": 1, "checkpoint_every_steps": 2, "engine": "torch", "tensorboard": False}
_TRAININGS = ("prior", "decoder", "upsampler_256", "upsampler_1024")
_ON_LOOPBACK = {"allowed_networks": ["127.0.0.0/8"], "backoff_s": 0.0, "retries": 0}


@dataclass(frozen=True)
class Desk:
    """A folder with all of it, and the server of its pictures.

    Attributes:
        folder: to be copied; paths in it are relative.
        server: of the pictures.
    """

    folder: Path
    server: Pictures


@contextlib.contextmanager
def desk(folder: Path) -> Iterator[Desk]:
    """Make it; the pictures are served as long as the block lasts."""
    (folder / "configs").mkdir(parents=True)
    for path in (TOP / "configs").iterdir():
        (folder / "configs" / path.name).symlink_to(path)
    _write(folder / "configs" / "quickstart.yaml", str(TOP / "tests" / "tiny.yaml"), _small(free_port()))
    with serving() as server, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        for week, rows in WEEKS.items():
            captions = [shapes.picture_of(SHAPES, row).caption for row in rows]
            (folder / "lists").mkdir(exist_ok=True)
            write_list(folder / "lists" / week / "pairs.jsonl", list(zip(map(server.url, rows), captions, strict=True)))
        _write(folder / "config.yaml", "configs/quickstart.yaml", _of_lists())
        _let_img2dataset_download(folder, server)
        for num_samples in (7, 6, 5):
            for command in ("run", "promote"):
                assert main([command, "config.yaml", "-s", f"generate.num_samples={num_samples}"]) == 0
        for seed, name in enumerate(("ring", "square")):
            assert main(["generate", "config.yaml", f"a red {name}", "--seed", str(seed), "-o", f"{name}.png"]) == 0
        with Image.open("ring.png") as ring:
            mask = Image.new("L", ring.size, 255)
        mask.paste(0, (mask.width // 2, 0, mask.width, mask.height))
        mask.save("mask.png")
        yield Desk(folder, server)


def _small(port: int) -> dict[str, Any]:
    return {
        **dict.fromkeys(("clip", *_TRAININGS), _STEPS),
        "root": "runs/quickstart",
        "cluster": {"executor": "local"},
        "source": {"shapes": {"num_images": 48, "port": port}, "rows_per_shard": 24},
        "pca": {"num_components": 16, "num_buckets": 8, "num_dot_buckets": 8},
        "generate": {"num_samples": 5, "until": "decoder"},
    }


def _of_lists() -> dict[str, Any]:
    return {
        "root": "store",
        "source": {"kind": "urls", "lists": ["lists"], "rows_per_shard": 24},
        "download": _ON_LOOPBACK,
        **{name: {"init_from": {"version": "production"}} for name in _TRAININGS},
    }


def _write(path: Path, extends: str, values: Mapping[str, Any]) -> None:
    path.unlink(missing_ok=True)
    path.write_text("\n".join([f"extends: {extends}", *(f"{key}: {json.dumps(values[key])}" for key in values)]))


def _let_img2dataset_download(folder: Path, server: Pictures) -> None:
    urls = [server.url(row) for row in range(8)]
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {url}" for url in urls]}), folder / "list.parquet")
    command = [sys.executable, "-c", MAKE, "list.parquet", "downloaded"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    values = {**_of_lists(), "root": "adopted", "source": {"kind": "urls", "lists": ["downloaded"]}}
    _write(folder / "adopting.yaml", "configs/quickstart.yaml", values)


def _ended(command: str | list[str], **options: Any) -> tuple[int, str]:
    ended = subprocess.run(command, capture_output=True, text=True, **options)
    return ended.returncode, ended.stdout + ended.stderr


class Session:
    """Somebody who tries one page at a copy of the desk, from its top to its end.

    Args:
        desk: to be copied.
        folder: where to.
        patch: of this test; the copy becomes the working folder.
    """

    def __init__(self, desk: Desk, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._desk = folder, desk
        shutil.copytree(desk.folder, folder, symlinks=True, dirs_exist_ok=True)
        patch.chdir(folder)

    def run(self, line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        """Do a line of a block; return the exit code and all that was said."""
        words = [self._meant(word, line) for word in shlex.split(line, comments=True)]
        variables: dict[str, str] = {}
        while "=" in words[0] and not words[0].startswith("-"):
            name, _, variables[name] = words.pop(0).partition("=")
        if words[0] != "unclip":
            return _ended(line, shell=True)
        if variables:  # some, such as Prefect's, are read once in a process
            return _ended([sys.executable, "-m", "flows.cli", *words[1:]], env=os.environ | variables)
        capsys.readouterr()
        code = main(words[1:])
        said = capsys.readouterr()
        return code, said.out + said.err

    def _meant(self, word: str, line: str) -> str:
        known = {
            "CONFIG": "adopting.yaml" if line.startswith("unclip adopt") else "config.yaml",
            "FOLDER": "downloaded",
            "DIR": "embeddings",
            "URL": self._desk.server.url(3),
            "SAMPLE": "2026-11-08/pairs.jsonl:3",
        }
        if word == "RUN":
            return max(path.stem for path in (self.folder / "store" / "runs").glob("*.json"))
        return known.get(word, word)
