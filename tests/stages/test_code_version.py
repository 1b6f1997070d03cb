"""What is said of the code: the commit of a checkout and whether it was changed; the release alone elsewhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from stages.code_version import code_version, described


def git(top: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(top), "-c", "init.defaultBranch=main", *arguments]
    return subprocess.run(command, env=os.environ | who, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_is_named_by_its_commit(tmp_path: Path) -> None:
    inside = tmp_path / "environment"
    inside.mkdir()
    git(tmp_path, "init")
    assert described("1.2", tmp_path) == "1.2", "nothing is committed yet"
    (tmp_path / "code.py").write_text("one")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "one")
    commit = f"1.2+g{git(tmp_path, 'rev-parse', 'HEAD')[:12]}"
    (tmp_path / "notes.txt").write_text("not a part of it")
    assert described("1.2", tmp_path) == commit
    (tmp_path / "code.py").write_text("two")
    assert described("1.2", tmp_path) == f"{commit}.dirty"
    assert described("1.2", inside) == "1.2", "somebody's repository around an environment"


def test_this_code_is_named() -> None:
    top = Path(__file__).parents[2]
    assert code_version() == described(code_version().partition("+")[0], top)
