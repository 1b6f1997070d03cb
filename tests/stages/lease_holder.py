"""Do a stage under its lease, slowly: a process for the tests to stop, kill and wake up.

Called as ``lease_holder.py ROOT TTL_S AHEAD_S [MACHINE]``. It says ``waits`` each time that it finds the lease held,
and ``held TOKEN`` once it has the lease and has done its shards, waits for a line on its standard input, publishes
the manifest and says how that went. Its time of day is wrong by ``AHEAD_S`` seconds. ``MACHINE`` is where it claims
to run; its own if not given.
"""

from __future__ import annotations

import sys

from tests.stages.wrong_clock import set_wrong

set_wrong(float(sys.argv[3]))

from stages import lease  # noqa: E402
from stages.errors import UnclipError  # noqa: E402
from stages.executor import ClusterConfig, LocalExecutor  # noqa: E402
from stages.runner import StageProgress, run_stage  # noqa: E402
from tests.stages.toy_stages import Numbers, NumbersConfig  # noqa: E402


def main(root: str, ttl_s: float) -> None:
    stage = Numbers(NumbersConfig(), root=root)
    fingerprint = stage.fingerprint({})

    with lease.hold(
        root, stage.name, fingerprint, ttl_s=ttl_s, run="child", on_wait=lambda holding: print("waits", flush=True)
    ) as held:

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
    if len(sys.argv) > 4:
        lease._this_machine = lambda: sys.argv[4]
    main(sys.argv[1], float(sys.argv[2]))
