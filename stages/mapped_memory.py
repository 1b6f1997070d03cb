"""Tensors in files of a local disk: the kernel reads and writes them as they are used, and keeps in memory what fits.

A file has no name from the moment it is mapped, so nothing stays on the disk when the process ends, however it ends.
Its space is reserved before: a disk that is too small is refused at once, not met in the midst of a step.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stages.errors import StorageError
from stages.units import GIB

Allocate = Callable[[Tensor], Tensor]


def zeros_in_files(folder: str) -> Allocate:
    """Give a function like ``torch.zeros_like`` whose tensors lie in files of ``folder``, on the CPU.

    Args:
        folder: on a disk of this host; made if it is not there.
    """

    def allocate(like: Tensor) -> Tensor:
        """Make a tensor of zeros.

        Raises:
            StorageError: if the folder cannot be written, or its disk has too little space left.
        """
        num_bytes = like.numel() * like.element_size()
        if not num_bytes:
            return torch.zeros_like(like, device="cpu")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix="unclip-offload-", dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                flat = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
        except OSError as error:
            raise StorageError(
                f"offload_dir: no file of {num_bytes / GIB:.2f} GiB in {folder} on {socket.gethostname()}: {error}; "
                "name a folder on a local disk with room for 28 bytes for each parameter that the host's ranks keep"
            ) from error
        return flat.view(like.shape)

    return allocate
