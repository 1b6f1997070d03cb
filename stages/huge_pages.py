"""Large pages for large tensors of the CPU's memory."""

from __future__ import annotations

import os


def prefer_huge_pages() -> None:
    """Let torch ask the kernel for huge pages; counts from a process's first tensor on, so call it before.

    ZeRO makes its buffers of gradients anew in every step, and the kernel takes longer to hand them out in pages of
    4 KiB than a rank to fill them. ``THP_MEM_ALLOC_ENABLE=0`` in the environment keeps the small ones; where the kernel
    has no others (``never`` in ``/sys/kernel/mm/transparent_hugepage/enabled``), nothing changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
