"""What a process holds in memory; ``ru_maxrss`` would begin with the peak of the process that started it."""

from __future__ import annotations

import re
from pathlib import Path


def resident_mib(name: str) -> float:
    """Return VmRSS (now) or VmHWM (the most) of this process, in MiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, name
    return int(found[1]) / 1024
