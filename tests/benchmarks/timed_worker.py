"""One side of a comparison: a process that builds models and runs them whenever it is told to.

It imports only torch, so that it also works in another project's environment. A line of standard input is a task; then
every line asks for a repetition, and an empty one ends the task. Each answer is a line of JSON. On the CPU each task is
done by a fork, whose peak of memory is that of the task alone, and which need not import anything again.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch._dynamo  # the optimizers would import it, in every fork anew
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.model_sizes import Task
from tests.resident import resident_mib

MIB = 2**20


class Work(NamedTuple):
    """A model, and one call of it: a forward pass, the loss of a training step, or a whole sampling run."""

    model: nn.Module
    call: Callable[[], Tensor]


class Inputs(NamedTuple):
    """Inputs that both sides share: captions of half the length, the rest padding that is zero."""

    x: Tensor
    t: Tensor
    image_embedding: Tensor
    text_embedding: Tensor
    text_sequence: Tensor
    tokens: Tensor


def draw_inputs(task: Task) -> Inputs:
    """Draw a batch; ``x`` are embeddings ``(B, D)``, or images ``(B, 3 or 6, S, S)``."""
    rng, sizes, batch = torch.Generator().manual_seed(1), task.sizes, task.batch_size
    shapes = {
        "prior": (sizes.embedding_dim,),
        "decoder": (3, sizes.decoder_px, sizes.decoder_px),
        "upsampler": (6, sizes.upsampler_px, sizes.upsampler_px),
    }
    tokens = torch.randint(1, 1000, (batch, sizes.context_length), generator=rng)
    tokens[:, sizes.context_length // 2 :] = 0
    sequence = torch.randn(batch, sizes.context_length, sizes.embedding_dim, generator=rng)
    inputs = Inputs(
        x=torch.randn(batch, *shapes[task.model], generator=rng),
        t=torch.randint(1000, (batch,), generator=rng),
        image_embedding=_unit(torch.randn(batch, sizes.embedding_dim, generator=rng)),
        text_embedding=_unit(torch.randn(batch, sizes.embedding_dim, generator=rng)),
        text_sequence=sequence * (tokens != 0)[..., None],
        tokens=tokens,
    )
    return Inputs(*(tensor.to(task.device) for tensor in inputs))


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def serve(build: Callable[[Task], Work]) -> None:
    """Measure the works that ``build`` makes of the tasks; see ``serve_tasks``."""
    serve_tasks(functools.partial(measure_work, build=build))


def serve_tasks(measure: Callable[[Task, TextIO], None]) -> None:
    """Do the tasks that standard input names, until it ends; call this before anything that starts threads.

    Args:
        measure: does one task, and writes its answers: facts, the seconds of every repetition, the peak of memory.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print must not get between the answers
    gc.freeze()
    while line := sys.stdin.readline():
        task = Task.from_json(line)
        if task.device == "cuda":  # whose allocator counts for itself, and which does not survive a fork
            measure(task, replies)
        elif pid := os.fork():
            if os.waitpid(pid, 0)[1]:
                sys.exit(f"failed: {task}")
        else:
            measure(task, replies)
            replies.flush()
            os._exit(0)


def measure_work(task: Task, replies: TextIO, *, build: Callable[[Task], Work]) -> None:
    """Build, warm up, and time one repetition per line of standard input, up to an empty one."""
    torch.set_num_threads(task.num_threads)
    work = build(task)
    others_mib = prepare(work.model, task.device)
    call = _operation(task, work)
    with FlopCounterMode(display=False) as counter:
        first = call()
    flop = counter.get_total_flops()
    _forget_peak(task.device)
    num_calls = _calibrated(call, task)
    answer(replies, {**facts(task, work.model), "output": float(first.float().abs().mean()), "flop": flop})
    while asked_again():
        answer(replies, _seconds(call, num_calls, task.device)._asdict())
    answer(replies, {"peak_mib": peak_mib(task.device, others_mib)})


def answer(replies: TextIO, values: Mapping[str, Any]) -> None:
    """Write one answer."""
    print(json.dumps(values), file=replies)


def asked_again() -> bool:
    """Wait for the next line; an empty one ends the task."""
    return bool(sys.stdin.readline().strip())


def prepare(model: nn.Module, device: str) -> float:
    """Make a built model ready to be measured; return what the process holds beside its weights, MiB."""
    _own_weights(model)
    _forget_peak(device)
    return resident_mib("VmRSS") - _weights_mib(model)


def peak_mib(device: str, others_mib: float) -> float:
    """Return the most memory since the peak was forgotten, without what was there beside the weights."""
    return torch.cuda.max_memory_allocated() / MIB if device == "cuda" else resident_mib("VmHWM") - others_mib


def _own_weights(model: nn.Module) -> None:
    """Copy weights out of the mapped files that they were read from, all of whose pages count as this process's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())


def _weights_mib(model: nn.Module) -> float:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / MIB


def _operation(task: Task, work: Work) -> Callable[[], Tensor]:
    """Complete a call: without gradients, or with the backward pass and AdamW's step; a loop has its own."""
    if task.operation == "loop":
        return work.call
    if task.operation == "train":
        work.model.train()
        # Fused, or its temporary tensors make the system hand out pages anew, more on one side than on the other.
        optimizer = torch.optim.AdamW(work.model.parameters(), lr=1e-5, fused=True)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with _autocast(task.device):
                loss = work.call()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step
    work.model.eval()

    @torch.no_grad()
    def call() -> Tensor:
        with _autocast(task.device):
            return work.call()

    return call


def _autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def _calibrated(call: Callable[[], Tensor], task: Task) -> int:
    """Return how many calls a repetition makes."""
    return max(1, round(task.min_seconds / _seconds(call, 1, task.device).wall_s))


class Seconds(NamedTuple):
    """Time per call: that of the clock, and that which the process's threads spent on the CPU."""

    wall_s: float
    cpu_s: float


def _seconds(call: Callable[[], Tensor], num_calls: int, device: str) -> Seconds:
    """Time ``num_calls`` calls and return the mean."""
    _wait(device)
    wall_started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(num_calls):
        call()
    _wait(device)
    return Seconds((time.perf_counter() - wall_started) / num_calls, (time.process_time() - cpu_started) / num_calls)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _forget_peak(device: str) -> None:
    """Return what is free to the system, and let the peak begin anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def facts(task: Task, model: nn.Module) -> dict[str, Any]:
    """Say what was measured: its size, and on what."""
    name = torch.cuda.get_device_name() if task.device == "cuda" else "cpu"
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"num_parameters": num_parameters, "torch": torch.__version__, "device": name}
