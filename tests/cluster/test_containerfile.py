"""The container file: its steps are the Makefile's, and it copies all that they need. (Building it needs a daemon.)"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

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
    from cluster.kubernetes import _USER_ID

    assert any(f"--uid {_USER_ID} " in run for run in RUNS)
