"""Run a download in a process of its own and print what it cost: ``download_in_process.py JOB``.

The job is a pickled ``(root, config, inputs)``; the answer one line of JSON: the manifest's URI, the seconds of the
stage without the imports, the largest memory of the process in MiB, and whether it loaded torch.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path

from stages.download import Download
from tests.resident import resident_mib
from tests.stages.download_data import run


def main() -> None:
    root, config, inputs = pickle.loads(Path(sys.argv[1]).read_bytes())
    stage = Download(config, root=root)
    stage.setup()
    started_at = time.monotonic()
    manifest = run(stage, inputs)
    answer = {
        "manifest": manifest.uri,
        "wall_s": time.monotonic() - started_at,
        "peak_mib": resident_mib("VmHWM"),
        "torch": "torch" in sys.modules,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
