"""The house keeps its shape: imports point one way, libraries stay in their rooms, packages are listed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
MAY_IMPORT = {
    "unclip_models": set(),
    "stages": {"unclip_models"},
    "cluster": {"stages", "unclip_models"},
    "flows": {"cluster", "stages", "unclip_models"},
}
# library -> the only files that may import it
CONFINED = {
    "prefect": {"flows/*"},
    "ray": {
        f"cluster/{name}.py"
        for name in (
            "connection",
            "ray_executor",
            "worker_pool",
            "training",
            "elastic",
            "group_network",
            "jobs",
            "draining",
        )
    },
    "deepspeed": {"cluster/deepspeed_engine.py"},
    "fsspec": {"stages/storage.py"},
    "s3fs": {"stages/storage.py"},
    "yaml": {"stages/config.py"},
    "pydantic": {"stages/config.py"},
    "img2dataset": {"stages/img2dataset_unit.py"},
    "open_clip": {"unclip_models/open_clip_models.py"},
    "prometheus_client": {"flows/run_metrics.py"},
    "opentelemetry": {"flows/run_traces.py"},
}
# Loaded on workers, or when a run begins.
HEAVY = {"torch", "torchvision", "ray", "deepspeed", "open_clip", "scipy", "img2dataset", "prefect"}
# Files of stages/ that are steps of the pipeline: they meet through manifests only.
STEPS = {"source", "download", "filter", "clip", "embed", "curate", "ledger", "pca", "train", "generate", "evaluate"}
FILES = sorted(path for package in MAY_IMPORT for path in (TOP / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield every module a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the package's name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TOP)))
def test_imports(path: Path) -> None:
    name = str(path.relative_to(TOP))
    package = name.split("/")[0]
    for module in imported(path):
        library, _, rest = module.partition(".")
        if library in MAY_IMPORT and library != package:
            assert library in MAY_IMPORT[package], f"{name} imports {module}: arrows point the other way"
        if library in CONFINED:
            allowed = CONFINED[library]
            assert name in allowed or f"{package}/*" in allowed, f"{name} imports {library}: only {sorted(allowed)} may"
        if package == "stages" == library and path.stem in STEPS:
            step = rest.split(".")[0]
            assert step == path.stem or step not in STEPS, f"{name} imports {module}: steps meet through manifests"


def test_no_file_is_a_drawer() -> None:
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_packages_are_listed() -> None:
    listed = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(path.parent.relative_to(TOP)).replace("/", ".") for path in FILES if path.name == "__init__.py"}
    assert set(listed) == found


def test_lock_names_versions_and_nothing_else() -> None:
    for line in (TOP / "requirements.lock").read_text().splitlines():
        assert "://" not in line and line.split(" ")[0].count("==") == 1, line


@pytest.mark.parametrize("command", [["plan"], ["status"], ["runs"], ["config"]])
def test_a_look_at_the_store_loads_no_heavy_library(command: list[str], tmp_path: Path) -> None:
    """Torch alone takes longer than all else: who plans, shows or finds everything done must not wait for it."""
    arguments = [*command, str(TOP / "tests" / "tiny.yaml"), "-s", f"root={tmp_path}"]
    code = (
        "import sys; from flows.cli import main; assert main(sys.argv[1:]) == 0; "
        f"heavy = {HEAVY!r} & sys.modules.keys(); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=TOP, stdout=subprocess.DEVNULL)
