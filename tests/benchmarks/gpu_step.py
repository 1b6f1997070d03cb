"""One training step of one model on one device: how fast, how much memory, and where the time goes.

Needs torch, numpy, safetensors and PyYAML; DeepSpeed for ZeRO alone. ``bench_gpu.py`` runs each job in a process of its
own: ``python -m tests.benchmarks.gpu_step JOB`` prints what it found as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from stages.engine import Engine, TorchEngine
from stages.engine_settings import EngineSettings
from stages.example_batch import example_batch
from stages.flops import flops_per_sample
from stages.out_of_memory import is_out_of_memory
from stages.units import GIB
from tests.resident import resident_mib
from unclip_models.checkpoint import build, config_from_dict
from unclip_models.efficiency import make_efficient
from unclip_models.randomness import SampleRandom
from unclip_models.settings import DecoderConfig, DiffusionPriorConfig, UpsamplerConfig

CONFIG_TYPES: dict[str, type] = {
    "prior": DiffusionPriorConfig,
    "decoder": DecoderConfig,
    "upsampler_256": UpsamplerConfig,
    "upsampler_1024": UpsamplerConfig,
}
_TERA = 1e12
_NUM_WARM_UP_STEPS = 3
_NUM_SHOWN = 12
_LEARNING_RATE = 1e-5
# Operations of torch -> what kind of work they are; the first that matches counts.
_KINDS = (
    ("optimizer", r"adam|lerp|foreach|vector_norm"),
    ("attention", r"attention"),
    ("convolution", r"conv"),
    ("matrix product", r"::(mm|addmm|bmm|baddbmm|linear|matmul|einsum)$"),
    ("normalisation", r"norm"),
    ("copies and casts", r"copy|cat|clone|contiguous|::to$|fill|zero|index|slice|pad|stack|split|Memcpy|Memset"),
    ("communication", r"c10d|nccl|gloo|all_?(reduce|gather)"),
)
_REST = "elementwise and reductions"
MODEL_WORK = ("matrix product", "convolution", "attention")  # what the count of FLOPs consists of


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure.

    Attributes:
        config: file with the sizes; its section ``model`` is read.
        model: a stage's name.
        engine: ``torch``, ``zero 1`` to ``zero 3``, or one of these with ``, offloaded``: the optimizer on the CPU.
        options: of ``channels_last`` and ``compile``, with spaces between.
        micro_batch: samples of a step.
        device: ``cuda`` or ``cpu``.
        min_seconds: steps are repeated for so long, three times at least.
    """

    config: str
    model: str
    engine: str = "torch"
    options: str = ""
    micro_batch: int = 1
    device: str = "cuda"
    min_seconds: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What one operation of torch took of a step: its name, what kind of work it is, and its share of the step."""

    name: str
    kind: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured.

    Attributes:
        num_parameters: of the model.
        flop_per_sample: counted on the model, forward and backward, nothing twice.
        step_s: seconds of every step.
        peak_gib: the most memory that was in use; allocated on a GPU, resident on a CPU.
        reserved_gib: what torch had taken of the GPU.
        shares: share of a step by kind of work, the largest first; ``idle`` is when the device waited.
        operations: the largest.
    """

    num_parameters: int
    flop_per_sample: float
    step_s: list[float]
    peak_gib: float
    reserved_gib: float
    shares: dict[str, float]
    operations: list[Operation]

    def samples_per_s(self, micro_batch: int) -> float:
        """Return the median speed."""
        return micro_batch / statistics.median(self.step_s)

    @property
    def bottleneck(self) -> str:
        """Name the largest kind of work that is not the model's own arithmetic: what to make faster next."""
        kind = next(kind for kind in self.shares if kind not in MODEL_WORK)
        worst = next((operation.name for operation in self.operations if operation.kind == kind), None)
        return f"{kind} {self.shares[kind]:.0%}" + (f" ({worst})" if worst else "")


def measure(job: Job) -> Found:
    """Measure a job in this process."""
    device = torch.device(job.device)
    with contextlib.ExitStack() as stack:
        config = model_config(job)
        with device:  # where there is room for the weights
            model = build(config)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        flop = flops_per_sample(model, model_loss, example_batch(config))
        options = job.options.split()
        make_efficient(model, compile="compile" in options, channels_last="channels_last" in options)
        step = _step_of(_engine(job, model, stack), batch_of(config, job.micro_batch, device), job)
        for _ in range(_NUM_WARM_UP_STEPS):
            step()
        _forget_peak(device)
        step_s: list[float] = []
        while len(step_s) < 3 or sum(step_s) < job.min_seconds:
            step_s.append(seconds_of(step, device))
        peak_gib, reserved_gib = memory_of(device)
        shares, operations = profiled(step, device)
    return Found(
        num_parameters=num_parameters,
        flop_per_sample=flop,
        step_s=step_s,
        peak_gib=peak_gib,
        reserved_gib=reserved_gib,
        shares=shares,
        operations=operations[:_NUM_SHOWN],
    )


def model_config(job: Job) -> Any:
    """Read the model's section; PyYAML alone, for machines without the whole pipeline."""
    values = yaml.safe_load(Path(job.config).read_text())[job.model]["model"]
    return config_from_dict(CONFIG_TYPES[job.model], values, f"{job.model}.model")


def model_loss(
    model: nn.Module, batch: Mapping[str, Tensor], random: SampleRandom
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Ask the model; ``stages.training`` has the same function, and imports the stores with it."""
    return model.loss(batch, random)  # type: ignore[operator]


def batch_of(config: Any, micro_batch: int, device: torch.device) -> dict[str, Tensor]:
    """Draw a batch of a model: embeddings of unit norm, images in [-1, 1], tokens."""
    batch = {}
    for name, example in example_batch(config).items():
        shape = (micro_batch, *example.shape[1:])
        if example.dtype == torch.int64:
            batch[name] = torch.randint(1, 1000, shape, device=device)
        elif len(shape) == 2:
            batch[name] = nn.functional.normalize(torch.randn(shape, device=device), dim=-1)
        else:
            batch[name] = torch.rand(shape, device=device) * 2 - 1
    return batch


def _engine(job: Job, model: nn.Module, stack: contextlib.ExitStack) -> Engine:
    settings = EngineSettings(micro_batch_size=job.micro_batch, precision="bf16", device=job.device)
    if job.engine == "torch":
        return TorchEngine(model, model_loss, settings)
    from cluster.deepspeed_engine import DeepSpeedEngine

    stage = int(job.engine.split()[1].rstrip(","))
    settings = dataclasses.replace(settings, zero_stage=stage)
    if "offloaded" in job.engine:
        settings = dataclasses.replace(settings, offload_optimizer="cpu")
    meeting = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "meeting"
    backend = "nccl" if job.device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    stack.callback(torch.distributed.destroy_process_group)
    engine = DeepSpeedEngine(model, model_loss, settings)
    stack.callback(engine.close)
    return engine


def _step_of(engine: Engine, batch: Mapping[str, Tensor], job: Job) -> Callable[[], None]:
    num_done = 0

    def step() -> None:
        nonlocal num_done
        random = SampleRandom(0, num_done, range(job.micro_batch), engine.device)
        engine.step([(batch, random)], _LEARNING_RATE)
        num_done += 1

    return step


# ---- measuring ------------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Time one call, from an idle device to an idle device."""
    wait_for(device)
    started_at = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - started_at


def wait_for(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_peak_tflops(device: torch.device, side: int, num_repetitions: int = 20) -> float:
    """Measure the arithmetic of a large square matrix product in bfloat16, the fastest of the repetitions; TFLOP/s."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(a, b)
    best_s = min(seconds_of(lambda: torch.mm(a, b), device) for _ in range(num_repetitions))
    return 2 * side**3 / best_s / _TERA


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_of(device: torch.device) -> tuple[float, float]:
    """Return the peak of what was in use, and of what torch had taken, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
    peak_gib = resident_mib("VmHWM") / 1024
    return peak_gib, peak_gib


def profiled(step: Callable[[], Any], device: torch.device) -> tuple[dict[str, float], list[Operation]]:
    """Profile one step: shares by kind of work and by operation, of the time that an unprofiled step takes.

    Time is that of the device, booked on the operation of torch that asked for it.
    """
    whole_s = statistics.median(seconds_of(step, device) for _ in range(3))
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        step()
        wait_for(device)
    seconds = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU
    }
    return breakdown(seconds, whole_s)


def breakdown(seconds: Mapping[str, float], whole_s: float) -> tuple[dict[str, float], list[Operation]]:
    """Turn seconds by operation into shares of a step, the largest first; what no operation took is ``idle``."""
    whole_s = max(whole_s, sum(seconds.values()))
    operations = [
        Operation(name=name, kind=kind_of(name), share=taken / whole_s) for name, taken in seconds.items() if taken > 0
    ]
    operations.sort(key=lambda operation: -operation.share)
    shares = {kind: sum(one.share for one in operations if one.kind == kind) for kind in _kinds(operations)}
    shares["idle"] = max(0.0, 1 - sum(shares.values()))
    return dict(sorted(shares.items(), key=lambda item: -item[1])), operations


def kind_of(operation: str) -> str:
    """Say what kind of work an operation of torch is."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, operation)), _REST)


def _kinds(operations: Iterable[Operation]) -> Sequence[str]:
    return sorted({operation.kind for operation in operations})


def found_from_json(values: Mapping[str, Any]) -> Found:
    """Read what ``main`` printed."""
    return Found(**{**values, "operations": [Operation(**operation) for operation in values["operations"]]})


def main() -> None:
    """Measure the job given as an argument; print what was found, or why it does not run."""
    job = Job(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(dataclasses.asdict(measure(job))))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(json.dumps({"out_of_memory": str(error).splitlines()[0]}))


if __name__ == "__main__":
    main()
