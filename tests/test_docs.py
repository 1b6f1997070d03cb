"""Commands in the documents: every ``unclip`` and ``make`` command is executed by a test or by CI, or needs more.

What stands in a fenced block says by the words behind its backticks how it is executed:

* ``sh``: here, as it stands, from the top of the page to its end, at the desk of ``tests/docs_desk.py``, in which
  CONFIG and the other words in capitals have a meaning. ``sh exit-3``: it ends with that code. A block ``text`` right
  behind is what it says: every line of it is found in the output, ``...`` standing for anything.
* ``sh elsewhere``: by the tests that ``ELSEWHERE`` names, or by ``.ci/run``.
* ``console <need>``: not by us; it needs what ``NEEDS`` names.

A command in the running text is executed if its subcommand and each of its options are, by one of the first two.

Commands of other programs are held to the same: those of ``prefect`` are in ``ELSEWHERE``, or their block names a need,
as ``pip`` does; a benchmark (``python -m tests.benchmarks.NAME``) is asked for its help, which must know the options.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.cli import build_parser
from tests.conftest import s3_environment
from tests.docs_desk import Desk, Session, desk

TOP = Path(__file__).parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))
CI = (TOP / ".ci" / "run").read_text()
NEEDS = {
    "cluster": "a Ray cluster of several machines, with a store that all of them see",
    "kubernetes": "a Kubernetes cluster, and a registry of images",
    "aws": "an account at Amazon",
    "index": "an index of packages that has this one",
}
# test -> the commands, and options of commands, that it executes; its file must name both.
ELSEWHERE = {
    "tests/cluster/test_job_submission.py::test_cancel_stops_all_jobs_of_a_config_and_store": (
        "cancel",
        "run --detach",
    ),
    "tests/flows/test_cli_exchange.py::test_a_karlo_checkpoint_comes_in_with_its_statistics_and_the_empty_caption": (
        *("import", "import --kind", "import -o"),
    ),
    "tests/flows/test_cli_store.py::test_a_whole_store_passes": ("verify --all", "verify --json"),
    "tests/flows/test_cli_store.py::test_damage_is_found_repaired_and_made_again": ("repair --dry-run",),
    "tests/flows/test_cli_store.py::test_gc_of_stale_results_keeps_what_the_configs_reach": (
        *("gc --apply", "gc --json", "gc --older-than", "gc --stale"),
    ),
    "tests/flows/test_config_reference.py::test_the_reference_is_current": ("config --reference",),
    "tests/flows/test_deployments.py::test_a_kubernetes_pool": ("deploy -s",),
    "tests/flows/test_deployments.py::test_a_scheduled_run_fails_is_tried_again_and_ends": ("deploy", "deploy --until"),
    "tests/flows/test_deployments.py::test_notices_stand_on_the_server_as_the_config_says": ("deploy --no-promote",),
    "tests/flows/test_deployments.py::test_retraining_by_the_clock_promotes_or_is_refused": ("deploy --retrain",),
    "tests/flows/test_deployments.py::test_serve_deploys_and_takes_the_runs": ("serve",),
    "tests/flows/test_deployments.py::test_a_run_by_prefects_own_command": (
        *("prefect deployment run", "prefect deployment run --param"),
    ),
    "tests/flows/prefect_setup.py::running_server": ("prefect server start",),
    "tests/flows/prefect_setup.py::running_worker": ("prefect worker start", "prefect worker start --pool"),
    "tests/flows/test_prefect_server.py::test_prefects_own_commands_choose_the_server": (
        *("prefect config set", "prefect config view"),
    ),
    "tests/flows/test_retraining_drill.py::test_three_weeks": ("retrain --from-scratch",),
    "tests/test_end_to_end.py::test_an_ablation_trains_its_variants_and_judges_the_claims": ("ablate",),
    "tests/test_end_to_end.py::undisturbed": ("make quickstart",),
}
# Targets that CI leaves out, and why.
NOT_IN_CI = {"bench-data": "an hour of an idle machine", "bench-train": "an hour of an idle machine"}
_PROGRAMS = ("unclip", "make", "docker", "kubectl", "ray", "prefect", "pip", "python")
_BENCHMARK = re.compile(r"python -m (tests\.benchmarks\.[a-z]\w*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: the words behind its backticks, and its lines with continued ones joined."""

    page: str
    mark: tuple[str, ...]
    body: str

    @property
    def lines(self) -> list[str]:
        joined = re.sub(r" *\\\n *", " ", self.body)
        return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    @property
    def runs_here(self) -> bool:
        return self.mark[:1] == ("sh",) and "elsewhere" not in self.mark

    def commands(self, *programs: str) -> list[str]:
        return [line for line in map(_without_variables, self.lines) if line.split(" ")[0] in programs]


def _without_variables(line: str) -> str:
    return re.sub(r"^(?:[A-Z_0-9]+=\S+ )+", "", line)


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```([^\n`]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(page.name, tuple(mark.split()), body) for mark, body in found]


BLOCKS = {page.name: blocks(page) for page in PAGES}
ALL = [block for page in BLOCKS.values() for block in page]


def mentioned(page: Path) -> Iterator[str]:
    """Yield the commands outside fenced blocks: in backticks, and indented."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", text):
        words = _without_variables(" ".join(code.split()))
        if words.startswith(("unclip ", "make ", "prefect ", "pip ")) and re.match(r"[a-z]", words.split()[1]):
            yield words
    for line in text.splitlines():
        assert not re.match(r" {4,}(unclip|make) ", line), f"{page.name}: '{line.strip()}': put it into a fenced block"


def parts(command: str) -> list[str]:
    """Return what has to be executed of a command: the subcommand, and it with each option in turn."""
    program, *words = [word.strip("[]") for word in shlex.split(command.replace("...", ""), comments=True)]
    name = words[0]
    if program == "prefect":
        # `prefect profile use local`: what it is done to is no part of the command.
        kinds = itertools.takewhile(lambda word: re.fullmatch("[a-z]+", word), words)
        name = " ".join(["prefect", *kinds][: 4 if words[0] == "deployment" else 3])
    if name in ("models", "render") and len(words) > 1 and words[1] in ("list", "kubernetes", "aws"):
        name = f"{name} {words[1]}"
    return [name, *(f"{name} {re.sub(r'=.*', '', word)}" for word in words if re.match(r"-{1,2}[a-z]", word))]


def executed_here() -> set[str]:
    here = [block for block in ALL if block.runs_here and len(block.mark) == 1]  # those that fail prove little
    return {part for block in here for line in block.commands("unclip") for part in parts(line)}


EXECUTED = executed_here() | {part for parts in ELSEWHERE.values() for part in parts}


def missing(command: str) -> list[str]:
    """Return what of a command nothing executes."""
    if command.startswith(("pip ", "python ")):
        return [] if _BENCHMARK.match(command) else [command.split(" ")[0]]
    if command.startswith("make "):
        targets = [word for word in shlex.split(command, comments=True)[1:] if "=" not in word]
        left = [target for target in targets if target not in NOT_IN_CI]
        return [target for target in left if not _does_ci(target)] + sorted(set(targets) - TARGETS)
    return [part for part in parts(command) if part not in EXECUTED]


def _does_ci(target: str) -> bool:
    """Tell whether CI makes a target, by itself or as what the others need."""
    by_itself = re.search(rf"^make {target}\b", CI, re.MULTILINE)
    return target == "setup" or by_itself is not None or f"make {target}" in EXECUTED


def complaints(page: Path) -> Iterator[str]:
    """Say what of a page nothing executes, and what bears no mark, or a wrong one."""
    for block in blocks(page):
        commands = block.commands(*_PROGRAMS)
        if not commands:
            continue
        if block.mark[:1] == ("console",):
            if len(block.mark) != 2 or block.mark[1] not in NEEDS:
                yield f"{commands[0]}: mark its block console and one of {sorted(NEEDS)}"
        elif block.mark[:1] != ("sh",):
            yield f"{commands[0]}: mark its block sh, sh elsewhere, or console and its need"
        elif others := block.commands("docker", "kubectl", "ray"):
            yield f"{others[0]}: mark its block console and its need"
        elif block.runs_here and (others := block.commands("make", "prefect", "python")):
            yield f"{others[0]}: mark its block sh elsewhere"
        elif others := block.commands("pip"):
            yield f"{others[0]}: mark its block console and its need"
        elif not block.runs_here:
            for line in block.commands("unclip", "make", "prefect", "python"):
                if what := missing(line):
                    yield f"{line}: nothing executes {what}; mark its block sh, or add the test that does to ELSEWHERE"
    for command in mentioned(page):
        if what := missing(command):
            yield f"`{command}`: nothing executes {what}; show it in a block sh, or add the test that does to ELSEWHERE"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_executed_or_says_what_it_needs(page: Path) -> None:
    assert list(complaints(page)) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```\nunclip plan CONFIG\n```\n", "unclip plan CONFIG: mark its block sh"),
        ("```console\nunclip plan CONFIG\n```\n", "unclip plan CONFIG: mark its block console and one of"),
        ("```console nothing\nunclip plan CONFIG\n```\n", "unclip plan CONFIG: mark its block console and one of"),
        ("```sh elsewhere\nunclip run CONFIG --unheard-of\n```\n", "nothing executes ['run --unheard-of']"),
        ("```sh elsewhere\nunclip deploy CONFIG --from embed\n```\n", "nothing executes ['deploy --from']"),
        ("```sh elsewhere\nmake nonsense\n```\n", "nothing executes ['nonsense'"),
        ("```sh\nmake lint\n```\n", "make lint: mark its block sh elsewhere"),
        ("```sh\nprefect server start\n```\n", "prefect server start: mark its block sh elsewhere"),
        ("```sh elsewhere\nprefect server stop\n```\n", "nothing executes ['prefect server stop']"),
        ("```sh elsewhere\nprefect deployment run X --watch\n```\n", "nothing executes ['prefect deployment run --wat"),
        ("```sh elsewhere\npython -m flows.cli\n```\n", "nothing executes ['python']"),
        ("```\npython -m tests.benchmarks.bench_pca\n```\n", "mark its block sh"),
        ("```sh\npip install x\n```\n", "pip install x: mark its block console and its need"),
        ("as `prefect deployment ls` says\n", "nothing executes ['prefect deployment ls']"),
        ("```sh\nkubectl apply\n```\n", "kubectl apply: mark its block console and its need"),
        ("as `unclip serve CONFIG --from embed` does\n", "nothing executes ['serve --from']"),
        ("after `make format`\n", "nothing executes ['format']"),
    ],
)
def test_what_nothing_executes_is_found(text: str, complaint: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}")
    (found,) = complaints(page)
    assert complaint in found


def test_an_indented_command_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n    unclip plan CONFIG\n")
    with pytest.raises(AssertionError, match="put it into a fenced block"):
        list(complaints(page))


def test_what_is_executed_elsewhere_is() -> None:
    for test, executed in ELSEWHERE.items():
        file, _, name = test.partition("::")
        source = (TOP / file).read_text()
        defined = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        assert name in defined, test
        said = [word for part in executed for word in part.split() if f'"{word}"' not in source]
        assert not said, f"{file} does not say {said}"
        if re.search(r"^pytestmark = .*mark\.chaos", source, re.MULTILINE):
            assert file.startswith(tuple(re.findall(r"tests/[\w/.]+", CI))), f"CI does not run {file}"


@pytest.mark.parametrize(
    "line",
    sorted({line for block in ALL for line in block.commands("unclip")}),
    ids=lambda line: line[:60],
)
def test_every_command_is_one_that_the_program_takes(line: str) -> None:
    words = ["1" if word == "N" else word for word in shlex.split(line, comments=True)[1:]]
    build_parser().parse_args(words)


def benchmarks() -> dict[str, set[str]]:
    """Return the benchmarks that the pages name, with the options that they are given there."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for match in _BENCHMARK.finditer(text := page.read_text()):
            options = re.findall(r"(?<= )--?[a-z][a-z-]*", re.split(r"[`\n]", text[match.end() :])[0])
            found.setdefault(match[1], set()).update(options)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("module", "options"), sorted(benchmarks().items()), ids=lambda value: str(value)[-20:])
def test_every_benchmark_is_there_and_takes_its_options(module: str, options: set[str]) -> None:
    asked = [sys.executable, "-m", module, "--help"]
    said = subprocess.run(asked, cwd=TOP, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0 and said.stdout.startswith("usage:"), said.stderr
    assert [option for option in options if not re.search(rf"{option}\b", said.stdout)] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, prefect_state: Path, s3_server: str) -> Iterator[Desk]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(prefect_state))
        for name, value in s3_environment(s3_server).items():
            patch.setenv(name, value)
        with desk(tmp_path_factory.mktemp("desk")) as found:
            yield found


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [name for name in BLOCKS if any(b.mark[:1] == ("sh",) and "elsewhere" not in b.mark for b in BLOCKS[name])]
)
def test_a_page_is_done_from_top_to_end(
    page: str, made: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(made, tmp_path / "desk", monkeypatch)
    said = ""
    for block in BLOCKS[page]:
        if block.mark == ("yaml",) and (named := re.match(r"# (\S+\.yaml)\n", block.body)):
            Path(named[1]).write_text(block.body)
        elif block.mark == ("text",) and said:
            for line in block.lines:
                pattern = ".*".join(re.escape(part) for part in line.split("..."))
                assert re.search(pattern, said), f"{page}: '{line}' is not in\n{said}"
        elif block.runs_here:
            expected = int(block.mark[1].removeprefix("exit-")) if len(block.mark) > 1 else 0
            said = ""
            for line in block.lines:
                code, output = session.run(line, capsys)
                assert code == expected, f"{page}: {line}: {code}\n{output}"
                said += output
            continue
        if block.mark != ("yaml",):
            said = ""


def test_the_runbook_quotes_messages_that_the_program_has() -> None:
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for package in ("stages", "cluster", "flows")
        for path in sorted((TOP / package).glob("*.py"))
    )
    rows = [
        line.split(" | ")[0] for line in (TOP / "docs" / "runbook.md").read_text().splitlines() if line[:3] == "| `"
    ]
    quoted = [part.strip() for row in rows for text in re.findall(r"`([^`]+)`", row) for part in text.split("...")]
    missing = [part for part in quoted if part.strip(" ;:") and part.strip(" ;:") not in sources]
    assert len(rows) >= 12 and not missing, missing
