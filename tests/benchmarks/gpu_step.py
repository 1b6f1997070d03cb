"""Training steps of one model on one device: how fast, how much memory, and where the time goes.

Needs torch, numpy, safetensors and PyYAML; DeepSpeed for ZeRO alone. ``bench_gpu.py`` runs each job in a process of its
own: ``python -m tests.benchmarks.gpu_step JOB`` prints what it has found so far as a line of JSON, again and again, so
that whatever ends it costs the last measurement alone.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cluster.memory import shape_of, states_and_passing
from stages.engine import Engine, TorchEngine
from stages.engine_settings import EngineSettings
from stages.example_batch import example_batch
from stages.flops import flops_per_sample
from stages.out_of_memory import is_out_of_memory
from stages.units import GIB
from tests.benchmarks.gpu_job import Found, Job, Operation, Trial, next_size
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


def measure(job: Job) -> Iterator[Found]:
    """Measure a job in this process; yield what is found so far after every micro batch, and at the end.

    Raises:
        RuntimeError: of torch, if not even the first micro batch fits.
    """
    started_at, device, config = time.monotonic(), torch.device(job.device), model_config(job)
    with contextlib.ExitStack() as stack:
        with device:  # where there is room for the weights
            model = build(config)
        with torch.device("meta"):
            twin = build(config)
        found = Found(
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            flop_per_sample=flops_per_sample(twin, model_loss, example_batch(config)),
        )
        options = job.options.split()
        make_efficient(model, compile="compile" in options, channels_last="channels_last" in options)
        engine = _engine(job, model, stack)
        size: int | None = job.micro_batch
        while size is not None:
            try:
                found = _with_trial(found, _step_of(engine, batch_of(config, size, device), size), size, device, job)
            except (MemoryError, RuntimeError) as error:
                if not (found.trials and is_out_of_memory(error)):
                    raise
                found = dataclasses.replace(found, end=f"{size} does not fit")
                break
            size, end = next_size(found.trials, job.largest)
            if size is not None and time.monotonic() - started_at > job.limit_s / 2:
                size, end = None, "out of time"
            found = dataclasses.replace(found, end=end)
            yield found
    settings = settings_of(job, found.best.micro_batch)
    shape = shape_of(twin, model_loss, example_batch(config), settings)
    planned = states_and_passing(settings, 1, shape, plain=job.engine == "torch")
    yield dataclasses.replace(found, planned_gib=planned.on_device / GIB)


def _with_trial(found: Found, step: Callable[[], None], micro_batch: int, device: torch.device, job: Job) -> Found:
    """Try a micro batch, and profile a step of it if none before was faster."""
    trial = _try(step, micro_batch, device, job.min_seconds)
    if found.trials and trial.samples_per_s <= found.best.samples_per_s:
        return dataclasses.replace(found, trials=[*found.trials, trial])
    shares, operations = profiled(step, device, statistics.median(trial.step_s))
    return dataclasses.replace(found, trials=[*found.trials, trial], shares=shares, operations=operations[:_NUM_SHOWN])


def _try(step: Callable[[], None], micro_batch: int, device: torch.device, min_seconds: float) -> Trial:
    for _ in range(_NUM_WARM_UP_STEPS):
        step()
    _forget_peak(device)
    step_s: list[float] = []
    while len(step_s) < 3 or sum(step_s) < min_seconds:
        step_s.append(seconds_of(step, device))
    peak_gib, reserved_gib = memory_in_use(device)
    return Trial(micro_batch=micro_batch, step_s=step_s, peak_gib=peak_gib, reserved_gib=reserved_gib)


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


def settings_of(job: Job, micro_batch: int) -> EngineSettings:
    """Write the engine's settings for a micro batch."""
    settings = EngineSettings(micro_batch_size=micro_batch, precision="bf16", device=job.device)
    if job.engine == "torch":
        return settings
    name, _, offloaded = job.engine.partition(", ")
    return dataclasses.replace(
        settings,
        zero_stage=int(name.removeprefix("zero ")),
        offload_optimizer="cpu" if offloaded else "none",
        offload_parameters="cpu" if offloaded == "all offloaded" else "none",
    )


def _engine(job: Job, model: nn.Module, stack: contextlib.ExitStack) -> Engine:
    settings = settings_of(job, job.micro_batch)
    if job.engine == "torch":
        return TorchEngine(model, model_loss, settings)
    from cluster.deepspeed_engine import DeepSpeedEngine

    meeting = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "meeting"
    backend = "nccl" if job.device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    stack.callback(torch.distributed.destroy_process_group)
    engine = DeepSpeedEngine(model, model_loss, settings)
    stack.callback(engine.close)
    return engine


def _step_of(engine: Engine, batch: Mapping[str, Tensor], micro_batch: int) -> Callable[[], None]:
    num_done = 0

    def step() -> None:
        nonlocal num_done
        random = SampleRandom(0, num_done, range(micro_batch), engine.device)
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


def memory_in_use(device: torch.device) -> tuple[float, float]:
    """Return the peak of what was in use, and of what torch had taken, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB
    peak_gib = resident_mib("VmHWM") / 1024
    return peak_gib, peak_gib


def profiled(step: Callable[[], Any], device: torch.device, whole_s: float) -> tuple[dict[str, float], list[Operation]]:
    """Profile one step: shares by kind of work and by operation, of the ``whole_s`` that an unprofiled step takes.

    Time is that of the device, booked on the operation of torch that asked for it.
    """
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


def main() -> None:
    """Measure the job given as an argument; print what was found so far, or why it does not run."""
    job = Job(**json.loads(sys.argv[1]))
    try:
        for found in measure(job):
            print(json.dumps(dataclasses.asdict(found)), flush=True)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(json.dumps({"out_of_memory": str(error).splitlines()[0]}))


if __name__ == "__main__":
    main()
