"""What the hardware can do and what a training takes of it: peak arithmetic of GPUs by name, memory of this process."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from stages.units import GIB

# Name of the device, whole -> dense peak in TFLOP/s: bf16 on tensor cores with float32 sums, and float32 (TF32 where
# there is such a thing). From the data sheets, without sparsity. Cards that are not here have no known peak: parts of
# a GPU, laptop versions and special editions share names with others and not their speed.
_PEAKS: tuple[tuple[str, float | None, float], ...] = (
    (r"Tesla V100-SXM[23].*", None, 15.7),
    (r"Tesla V100-PCIE.*", None, 14.0),
    (r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe", 312.0, 156.0),
    (r"NVIDIA A10G", 70.0, 35.0),
    (r"NVIDIA L4", 121.0, 60.0),
    (r"NVIDIA L40S", 362.05, 183.0),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6),
    (r"NVIDIA H100 80GB HBM3", 989.4, 494.7),
    (r"NVIDIA H100 PCIe", 756.0, 378.0),
    (r"NVIDIA H100 NVL|NVIDIA H200 NVL", 835.5, 417.5),
    (r"NVIDIA H200", 989.4, 494.7),
    (r"NVIDIA B200", 2250.0, 1125.0),
)


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Look a GPU's dense peak up.

    Args:
        device_name: as the driver gives it, ``NVIDIA H100 80GB HBM3``.
        precision: ``bf16`` or ``fp16``, which are equally fast, or ``fp32`` (TF32 on cards that have it: convolutions
            use it by default).

    Returns:
        TFLOP/s; None where it is not known.
    """
    for pattern, bf16, fp32 in _PEAKS:
        if re.fullmatch(pattern, device_name):
            return fp32 if precision == "fp32" else bf16
    return None


def least_gpu_memory_gib() -> float | None:
    """Return the memory of the smallest GPU of this machine, GiB; None where torch finds none."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return min(sizes) / GIB if sizes else None


def memory_gib(device: torch.device) -> float:
    """Return the most memory torch has allocated on a GPU so far, or what this process holds now on a CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(kib) * 1024 / GIB
