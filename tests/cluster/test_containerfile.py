"""The container file: its steps are the Makefile's, it copies all that they need, and they run, one after the other.

A builder of images needs a daemon and the registry of the base image. Instead the steps are done on a copy-on-write
layer over this machine, which is Debian with Python 3.11 as the base image is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.kubernetes import _USER_ID
from tests.cluster.machines import ENVIRONMENT

TOP = Path(__file__).parents[2]
LINES = [
    line.split(maxsplit=1)
    for line in (TOP / "cluster" / "Containerfile").read_text().splitlines()
    if line and not line.startswith("#")
]
RUNS = [rest for word, rest in LINES if word == "RUN"]
COPIED = [part for word, rest in LINES if word == "COPY" for part in rest.split()[1:-1]]
MAKEFILE = (TOP / "Makefile").read_text()
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())


def test_every_step_of_ours_is_the_target_that_ci_runs() -> None:
    steps = [run for run in RUNS if not run.startswith(("apt-get update", "useradd"))]
    assert steps == ["make setup"]
    # CI's first target depends on it, on a checkout without a virtual environment.
    first = re.search(r"^make (\S+)", (TOP / ".ci" / "run").read_text(), re.MULTILINE)
    assert first is not None and re.search(rf"^{first[1]}: setup\b", MAKEFILE, re.MULTILINE)


def test_what_the_step_reads_is_copied_before_it() -> None:
    needed = re.search(r"^\$\(VENV\)/\.installed: (.*)$", MAKEFILE, re.MULTILINE)
    assert needed is not None
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert {"Makefile", *needed[1].split(), PROJECT["project"]["readme"], *packages} <= set(COPIED)
    assert all((TOP / path).exists() for path in COPIED)
    words = [word for word, _ in LINES]
    assert max(i for i, word in enumerate(words) if word == "COPY") < LINES.index(["RUN", "make setup"])
    sent = {line[1:] for line in (TOP / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == set(COPIED)


def test_its_python_and_its_user_are_the_ones_that_pods_expect() -> None:
    [base] = [rest for word, rest in LINES if word == "FROM"]
    version = re.search(r"python:(\d\.\d+)", base)
    python = re.search(r"^PYTHON \?= python(\S+)$", MAKEFILE, re.MULTILINE)
    assert version is not None and python is not None and version[1] == python[1]
    assert any(f"--uid {_USER_ID} " in run for run in RUNS)


def test_it_says_of_ray_what_the_drills_say() -> None:
    said = dict(rest.split("=", 1) for word, rest in LINES if word == "ENV" and rest.startswith("RAY_"))
    assert said and said.items() <= ENVIRONMENT.items()


class Layer:
    """A root file system over this machine's, and the state in which steps leave each other."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._user, self._folder = "root", "/"
        self._environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PWD")}

    def do(self, word: str, rest: str) -> str:
        """Do one line of the file; return what it said."""
        if word == "RUN":
            return self.run("sh", "-c", rest)
        if word == "CMD":
            return self.run(*json.loads(rest))
        if word == "USER":
            self._user = rest
        elif word == "WORKDIR":
            self._folder = rest
        elif word == "ENV":
            name, value = rest.split("=", 1)
            self._environment[name] = value.replace("$PATH", self._environment["PATH"])
        elif word == "COPY":
            self._copy(*rest.split())
        else:
            assert word == "FROM"
            # The base image has no people, and its Python is everybody's, not of root's home.
            self.run("sed", "-i", rf"/^[^:]*:x\?:{_USER_ID}:/d", "/etc/passwd", "/etc/group")
            self.run("chmod", "o+x", "/root")
        return ""

    def run(self, *words: str) -> str:
        """Run a program as the user, in the folder, of the steps so far."""
        enter = f'cd "{self._folder}" && exec "$@"'
        command = ["chroot", f"--userspec={self._user}:", str(self._root), "sh", "-c", enter, "step", *words]
        home = "/root" if self._user == "root" else f"/home/{self._user}"
        done = subprocess.run(command, env={**self._environment, "HOME": home}, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def _copy(self, owner: str, *paths: str) -> None:
        assert owner == f"--chown={self._user}"
        *sources, target = paths
        into = self._root / self._folder.lstrip("/") / target
        for source in sources:
            if (TOP / source).is_dir():
                shutil.copytree(TOP / source, into, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(TOP / source, into)
        user, self._user = self._user, "root"
        self.run("chown", "--recursive", f"{user}:", target)
        self._user = user


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Layer]:
    root = tmp_path / "root"
    over = [tmp_path / "upper", tmp_path / "work"]
    for folder in (root, *over):
        folder.mkdir()
    options = f"lowerdir=/,upperdir={over[0]},workdir={over[1]}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(root)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
        subprocess.run(["mount", "--bind", "/dev", str(root / "dev")], check=True)
        yield Layer(root)
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(root)], check=True)
        shutil.rmtree(over[0])  # gigabytes, which pytest would keep


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_every_step_runs(layer: Layer) -> None:
    said = [layer.do(word, rest) for word, rest in LINES]
    assert said[-1].startswith("usage: unclip")
    assert layer.run("id", "-u").strip() == str(_USER_ID)
    found = layer.run("python", "-c", "import flows.cli, pathlib; print(pathlib.Path(flows.cli.__file__).parent)")
    assert found.strip() == "/opt/unclip/flows"
    programs = layer.run("bash", "--login", "-c", "command -v ray unclip python").split()
    assert programs == [f"/opt/unclip/.venv/bin/{name}" for name in ("ray", "unclip", "python")]
    assert "root:" in layer.run("unclip", "config", "configs/quickstart.yaml")
