"""The command line: exit codes, one line per mistake, nothing started when nothing is to do, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.cli import main
from flows.selection import check_upstream, select
from stages.errors import ConfigError
from stages.graph import STAGE_NAMES

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def arguments(root: Path, num_images: int = 40, executor: str = "local") -> list[str]:
    values = {
        "root": root / "store",
        "cluster.executor": executor,
        "cluster.num_cpus": 1,
        "source.shapes.num_images": num_images,
        "source.rows_per_shard": min(num_images, 1_000_000),
    }
    return [CONFIG, *(part for key, value in values.items() for part in ("-s", f"{key}={value}"))]


# ---- bad usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], "COMMAND"),
        (["statsu", CONFIG], "statsu: no such command; did you mean 'status'?"),
        (["run"], "required: CONFIG; see unclip run --help"),
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot read the config file"),
        (
            ["run", CONFIG, "--only", "upsampler-256"],
            "--only upsampler-256: no such stage; did you mean 'upsampler_256'?",
        ),
        (["run", CONFIG, "--from", "xyzzy"], "the stages are: source, download"),
        (["run", CONFIG, "--detach"], "--detach: this run is no Ray Job"),
        (["retry", CONFIG, "--detach"], "set cluster.submit to a cluster's dashboard"),
        (["run", CONFIG, "--only", "clip", "--until", "pca"], "--only: cannot be joined"),
        (["run", CONFIG, "--from", "pca", "--until", "clip"], "nothing is left to run"),
        (["run", CONFIG, "--until", "clip", "--force", "pca"], "--force pca: it is not among the stages of this run"),
        (["run", CONFIG, "-s", "decoder.learning_rat=1"], "did you mean 'decoder.learning_rate'?"),
        (["plan", "-s", "seed=two", CONFIG], 'seed: "two"'),
        (["generate", CONFIG, "a red square", "-o", "x.jpg"], "give a name that ends in .png"),
        (["generate", CONFIG, " ", "-o", "x.png"], "CAPTION: is empty"),
        (["edit", CONFIG, "x.png", "-o", "y.png"], "--to: missing"),
        (["edit", CONFIG, "x.png", "--mask", "m.png", "--zoom", "2", "-o", "y.png"], "give one of them"),
        (["edit", CONFIG, "x.png", "--to", "a", "--theta", "2", "-o", "y.png"], "--theta 2: is not between 0 and 1"),
        (["vary", CONFIG, "x.png", "--eta", "-1", "-o", "y.png"], "--eta -1: is not between 0 and 1"),
        (["interpolate", CONFIG, "x.png", "y.png", "-n", "1", "-o", "z.gif"], "write 2 or more"),
        (["export", CONFIG, "--format", "onnx", "-o", "out"], "invalid choice: 'onnx'"),
        (["import", "x.ckpt", "--kind", "prior", "-o", "x.bin"], "give a name that ends in .safetensors"),
        (["generate", CONFIG, "a red square", "-n", "0", "-o", "x.png"], "0 is below 1"),
        (["runs", CONFIG, "-n", "-3"], "--newest -3: is below 1"),
        (["plan", CONFIG, "--rows", "5"], "--rows: goes with --cost only"),
        (["plan", CONFIG, "--cost", "--measured-in", "/nowhere"], "--measured-in /nowhere: holds no result"),
        (["gc", CONFIG, "--older-than", "nan"], "--older-than nan: write a number of days"),
        (["run", CONFIG, "-s", "cluster.num_cpus=-1"], "num_cpus: -1 is below 1"),
        (["run", CONFIG, "-s", "cluster.backoff_s=-3"], "backoff_s: -3"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    line: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("unclip: ") and expected in errors and errors.count("\n") == 1


def test_a_stage_alone_needs_its_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments(tmp_path), "--only", "embed"]) == 2
    assert "embed: needs filter, which is not done for these settings" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").write_text("a file")
    assert main(["run", *arguments(tmp_path), "--only", "source"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"unclip: cannot write {tmp_path}/store") and errors.count("\n") == 1


def test_an_input_that_is_wrong_fails_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions.txt").write_text("")
    given = f"generate.captions_uri={tmp_path}/captions.txt"
    assert main(["run", *arguments(tmp_path), "-s", given]) == 1
    errors = capsys.readouterr().err
    assert "holds no caption" in errors and "Traceback" not in errors


def test_errors_are_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments(tmp_path), "--only", "embed", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "failed" and "needs filter" in said["errors"][0]


# ---- selections -----------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")


def test_select() -> None:
    assert select(NAMES).stages == NAMES
    assert select(NAMES, start="b").stages == ("b", "c", "d")
    assert select(NAMES, until="b").stages == ("a", "b")
    assert select(NAMES, start="b", until="c").stages == ("b", "c")
    assert select(NAMES, only="c", force=["c"]) == select(NAMES, start="c", until="c", force=["c", "c"])


def test_upstream_must_be_done_or_part_of_the_run() -> None:
    upstream = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
    done = {"a": True, "b": False, "c": True, "d": False}
    check_upstream(select(NAMES, start="b"), upstream, done)
    check_upstream(select(NAMES, only="b"), upstream, done)
    with pytest.raises(ConfigError, match="d: needs b"):
        check_upstream(select(NAMES, start="c"), upstream, done)


# ---- what looks, and changes nothing --------------------------------------------------------------------------------


def test_plan_and_status_of_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments(tmp_path), "--until", "filter"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in STAGE_NAMES) and "no result for these settings" in table
    assert main(["plan", *arguments(tmp_path), "--until", "filter", "--json"]) == 0
    rows = {row["stage"]: row for row in json.loads(capsys.readouterr().out)}
    assert tuple(rows) == STAGE_NAMES
    assert [rows[name]["status"] for name in ("source", "filter", "clip")] == ["will run", "will run", "skipped"]
    assert (rows["source"]["num_done"], rows["source"]["num_shards"]) == (0, 1) and rows["embed"]["num_shards"] is None
    assert main(["status", *arguments(tmp_path), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [row["fingerprint"] for row in status["stages"]] == [row["fingerprint"] for row in rows.values()]
    assert not (tmp_path / "store").exists()


def test_config_prints_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "-s", "seed=7", CONFIG, "-s", "decoder.learning_rate=1e-4"]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert "seed: 7" in resolved.read_text()
    assert main(["config", str(resolved)]) == 0
    assert capsys.readouterr().out == resolved.read_text()


def test_models_counts_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    from stages.config import load_config
    from unclip_models.checkpoint import build

    assert main(["models", CONFIG, "--json"]) == 0
    sizes = {row["model"]: row["num_parameters"] for row in json.loads(capsys.readouterr().out)}
    upsampler = build(load_config(CONFIG).upsampler_256.model)
    assert sizes["upsampler_256"] == sum(parameter.numel() for parameter in upsampler.parameters())
    assert all(count > 1000 for count in sizes.values()) and len(sizes) == 5


def test_generate_needs_trained_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", *arguments(tmp_path), "a red square", "-o", str(tmp_path / "x.png")])
    assert code == 1 and "not finished" in capsys.readouterr().err


# ---- real runs in processes of their own ----------------------------------------------------------------------------


def start(state: Path, line: list[str]) -> subprocess.Popen[str]:
    """Start the command in a session of its own; it finds or starts the Prefect server of that state folder."""
    code = "import sys; from flows.cli import main; code = main(sys.argv[1:])"
    check = "; print(sorted({'prefect', 'ray'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    environment |= {"XDG_STATE_HOME": str(state), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code + check, *line],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_run_and_run_again(tmp_path: Path, prefect_state: Path) -> None:
    line = ["run", *arguments(tmp_path), "--only", "source", "--json"]
    first = start(prefect_state, line)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 0, err
    said = json.loads(out)
    assert said["status"] == "done" and [(row["stage"], row["status"]) for row in said["stages"]] == [
        ("source", "done")
    ]
    assert Path(said["report"]).is_file()
    # A quiet log: two lines of ours, then this test's own.
    lines = err.splitlines()
    assert len(lines) == 3 and "INFO stage=source started: 1 shard" in lines[0] and "done in" in lines[1], err
    second = start(prefect_state, line)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert [row["status"] for row in json.loads(out)["stages"]] == ["cached"]
    assert err.splitlines()[-1] == "[]", "Prefect or Ray was imported to do nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "number", "code"),
    [
        ("ray", signal.SIGINT, 130),
        ("ray", signal.SIGTERM, 143),
        ("local", signal.SIGINT, 130),
        ("local", signal.SIGHUP, 129),
    ],
)
def test_a_signal_stops_the_run_within_seconds(
    tmp_path: Path, prefect_state: Path, executor: str, number: signal.Signals, code: int
) -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is, by whatever is started, too
    try:
        process = start(prefect_state, ["run", *arguments(tmp_path, 3_000_000, executor), "--only", "source"])
    finally:
        signal.signal(signal.SIGHUP, ignored)
    try:
        before = ""
        while "started: 3 shards" not in before:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line, before
            before += line
        time.sleep(2)
        process.send_signal(number)
        sent_at = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - sent_at < 12
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err and "the same command goes on" in err
    assert not left_in_session(process.pid)


def left_in_session(session: int) -> list[str]:
    """List what still runs in a session a moment after its leader has ended."""
    import psutil

    for _ in range(50):
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            try:
                alive = process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.info["pid"]) == session
            except OSError:
                continue
            if alive:
                found.append(" ".join(process.info["cmdline"] or []))
        if not found:
            break
        time.sleep(0.2)
    return found
