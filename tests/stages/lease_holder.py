"""Do a stage under its lease, slowly: a process for the tests to stop, kill and wake up.

Called as ``lease_holder.py ROOT TTL_S [MACHINE]``. It says ``held TOKEN`` once it has the lease and has done
its shards, waits for a line on its standard input, publishes the manifest and says how that went. Its clocks are wrong
by years. ``MACHINE`` is where it claims to run; its own if not given.
"""

from __future__ import annotations

import sys
import time

_true_time, _true_monotonic = time.time, time.monotonic
time.time = lambda: _true_time() - 3e8
time.monotonic = lambda: _true_monotonic() + 1e7

from stages import lease  # noqa: E402
from stages.errors import UnclipError  # noqa: E402
from stages.executor import ClusterConfig, LocalExecutor  # noqa: E402
from stages.runner import StageProgress, run_stage  # noqa: E402
from tests.stages.toy_stages import Numbers, NumbersConfig  # noqa: E402


def main(root: str, ttl_s: float) -> None:
    stage = Numbers(NumbersConfig(), root=root)
    fingerprint = stage.fingerprint({})

    with lease.hold(root, stage.name, fingerprint, ttl_s=ttl_s, run="child") as held:

        def on_progress(progress: StageProgress) -> None:
            if progress.num_done == progress.num_shards and not progress.finished:
                print(f"held {held.token}", flush=True)
                sys.stdin.readline()

        try:
            run_stage(stage, fingerprint, {}, LocalExecutor(), ClusterConfig(), on_progress=on_progress, lease=held)
            print("published", flush=True)
        except UnclipError as error:
            print(type(error).__name__, error, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        lease._this_machine = lambda: sys.argv[3]
    main(sys.argv[1], float(sys.argv[2]))
