"""Deterministic mode: the same bits from the same settings on one machine, or an error that names the operation."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from stages.errors import StageError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_REFUSAL = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def deterministic(enabled: bool, place: str) -> Iterator[None]:
    """Let torch use deterministic algorithms alone; everything is as before afterwards.

    Args:
        enabled: False does nothing.
        place: the stage, for messages.

    Raises:
        StageError: names an operation that has no deterministic implementation.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS refuses to be deterministic without
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if refusal := _REFUSAL.search(str(error)):
            raise StageError(
                f"{place}.deterministic: true, but {refusal[1]} has no deterministic implementation on this device; "
                f"set {place}.deterministic: false, or change the model so that it does without"
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if workspace is None:
            del os.environ[_WORKSPACE]
