"""The hard end of a run that cannot be stopped in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flows.run_record import read_runs

RUN = """
import os, signal, sys, time
from functools import partial
from flows.interrupt import Interrupt
from flows.recording import Recording
from flows.run_record import begin_run

root = sys.argv[1]
recording = Recording(begin_run(root, config="c.yaml", config_digest="", selected=["source"], estimates={}))
with Interrupt(deadline_s=0.3) as interrupt:
    interrupt.notes(partial(recording.close_cancelled, root))
    interrupt.closes(lambda: time.sleep(60))  # workers that do not end
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_run_that_must_be_ended_hard_is_recorded_as_cancelled(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], cwd=Path(__file__).parents[2], timeout=50)
    assert done.returncode == 143
    (record,) = read_runs(str(tmp_path))
    assert (record.status, record.exit_code) == ("cancelled", 143) and record.ended_at
