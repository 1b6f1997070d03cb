"""Training loops as sides of a comparison: ours, and a bare one.

Ours is ``stages.training.train`` as the stages call it: stream of shards, checks, log, watchdog and all; between two
repetitions its stream keeps it waiting. The bare loop is the one of PyTorch's tutorials: fused AdamW, clipping,
PyTorch's own moving average, noise out of torch's generator, and batches that lie in memory before the clock starts.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stages.dataset import Batch, TrainingStream
from stages.engine import EngineFactory, TorchEngine
from stages.huge_pages import prefer_huge_pages
from stages.training import model_loss, train
from stages.training_config import TrainingConfig
from tests.benchmarks.bench_loader import read_shards
from tests.benchmarks.model_sizes import Task
from tests.benchmarks.timed_worker import (
    Seconds,
    Work,
    answer,
    asked_again,
    draw_inputs,
    facts,
    measure_work,
    peak_mib,
    prepare,
    serve_tasks,
)
from tests.cluster.ranks import joined
from unclip_models.clip import tokenize
from unclip_models.diffusers_format import import_diffusers
from unclip_models.randomness import SampleRandom
from unclip_models.settings import UpsamplerConfig
from unclip_models.upsampler import training_sample

LEARNING_RATE, MAX_NORM, EMA_DECAY = 1e-5, 1.0, 0.9999
_ENDLESS = 10**9
_NUM_BARE_BATCHES = 16


def model_of(task: Task) -> nn.Module:
    """Read the model that both loops train."""
    return import_diffusers(Path(task.folder) / task.model, task.model).to(task.device)


def stream_of(task: Task, model: nn.Module) -> TrainingStream:
    """Open the shards for a model, as its stage does."""
    config: Any = model.config
    root = str(Path(task.folder) / "data")
    is_upsampler = isinstance(config, UpsamplerConfig)
    return TrainingStream(
        read_shards(root),
        root=root,
        num_streams=math.gcd(8, task.batch_size),
        global_batch_size=task.batch_size,
        seed=0,
        image_size_px=getattr(config, "image_size", None),
        tokenize=None if is_upsampler else partial(tokenize, context_length=config.text.context_length),
        embeddings=not is_upsampler,
        prepare=partial(training_sample, config) if is_upsampler else None,
    )


class LossWithText:
    """The model's loss, on batches to which the captions' hidden states are added.

    They are drawn once, as for dalle2-pytorch: in a training the frozen CLIP would compute them, for everyone alike.
    """

    def __init__(self, task: Task) -> None:
        self._text_sequence = draw_inputs(task).text_sequence
        self.last = math.nan

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], random: SampleRandom
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss, terms = model_loss(model, {**batch, "text_sequence": self._text_sequence}, random)
        self.last = float(loss.detach())
        return loss, terms


# ---- ours -----------------------------------------------------------------------------------------------------------


class EnoughError(Exception):
    """No further repetition is wanted."""


class TurnByTurn:
    """A stream that gives batches while repetitions are asked for, and measures them from batch to batch.

    Args:
        stream: the real one.
        task: says how long a repetition takes.
        tell: gets the seconds per step of every repetition; before the first, once, None.
    """

    def __init__(self, stream: TrainingStream, task: Task, tell: Callable[[Seconds | None], None]) -> None:
        self.global_batch_size = stream.global_batch_size
        self._stream = stream
        self._task = task
        self._tell = tell

    def batches(self, first_step: int, rank: int, world_size: int) -> Generator[Batch, None, None]:
        """See ``stages.dataset.Stream``."""
        with contextlib.closing(self._stream.batches(first_step, rank, world_size)) as batches:
            yield next(batches)  # this step allocates
            started_at = time.perf_counter()
            yield next(batches)
            num_steps = max(1, round(self._task.min_seconds / (time.perf_counter() - started_at)))
            self._tell(None)
            # The CPU's clock runs on while others have their turn: what is read ahead then is used here.
            cpu_at = time.process_time()
            while asked_again():
                wall_at = time.perf_counter()
                for _ in range(num_steps):
                    yield next(batches)
                wall_s, cpu_s = time.perf_counter() - wall_at, time.process_time() - cpu_at
                cpu_at += cpu_s
                self._tell(Seconds(wall_s / num_steps, cpu_s / num_steps))
        raise EnoughError


def run_ours(task: Task, replies: TextIO) -> None:
    """Train, one repetition per line of standard input."""
    torch.set_num_threads(task.num_threads)
    with contextlib.ExitStack() as stack:
        make_engine = _engine_of(task, stack)
        model, loss = model_of(task), LossWithText(task)
        num_flop = count_flop(task, model, loss)
        size = facts(task, model)
        others_mib = prepare(model, task.device)

        def tell(seconds: Seconds | None) -> None:
            known = {**size, "output": loss.last, "flop": num_flop}
            answer(replies, known if seconds is None else seconds._asdict())

        stack.enter_context(contextlib.suppress(EnoughError))
        train(
            model,
            TurnByTurn(stream_of(task, model), task, tell),
            config_of(task),
            make_engine=make_engine,
            seed=0,
            folder=stack.enter_context(tempfile.TemporaryDirectory(dir=task.folder)),
            place=task.model,
            loss=loss,
            num_timesteps=1000,
        )
    answer(replies, {"peak_mib": peak_mib(task.device, others_mib)})


def config_of(task: Task, **settings: Any) -> TrainingConfig:
    """Write the settings of our training; those that are not named are as for every training."""
    zero = {"zero_stage": int(task.engine.split()[1])} if task.engine.startswith("zero") else {"engine": "torch"}
    return TrainingConfig(
        **{
            "num_steps": _ENDLESS,
            "global_batch_size": task.batch_size,
            "num_streams": math.gcd(8, task.batch_size),
            "learning_rate": LEARNING_RATE,
            "gradient_clipping": MAX_NORM,
            "ema_decay": EMA_DECAY,
            "checkpoint_every_steps": _ENDLESS,
            **zero,
            **settings,
        }
    )


def count_flop(task: Task, model: nn.Module, loss: LossWithText) -> int:
    """Count the operations of a step; the model is left as it was."""
    (batch,) = _batches_in_memory(task, model, 1)
    with FlopCounterMode(display=False) as counter:
        loss(model, batch, TorchRandom(0, 0, range(task.batch_size), task.device))[0].backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def _engine_of(task: Task, stack: contextlib.ExitStack) -> EngineFactory:
    if task.engine == "torch":
        return TorchEngine
    from cluster.deepspeed_engine import DeepSpeedEngine

    meeting = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=task.folder))) / "meeting"
    stack.enter_context(joined(0, 1, meeting))
    torch.set_num_threads(task.num_threads)
    return DeepSpeedEngine


# ---- bare -----------------------------------------------------------------------------------------------------------


class TorchRandom(SampleRandom):
    """The numbers of a step out of torch's own generator: as many, whatever the sample."""

    def normal(self, tag: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(len(self), *shape, device=self.device)

    def uniform(self, tag: str) -> Tensor:
        return torch.rand(len(self), device=self.device)

    def integers(self, tag: str, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (len(self),), device=self.device)

    def bernoulli(self, tag: str, p: float) -> Tensor:
        return torch.rand(len(self), device=self.device) < p


def build_bare(task: Task) -> Work:
    """Build the bare loop; a call is a step."""
    model, loss = model_of(task).train(), LossWithText(task)
    batches = itertools.cycle(_batches_in_memory(task, model, _NUM_BARE_BATCHES))
    random = TorchRandom(0, 0, range(task.batch_size), task.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value, _ = loss(model, next(batches), random)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        average.update_parameters(model)
        return value.detach()

    return Work(model, step)


def _batches_in_memory(task: Task, model: nn.Module, num_batches: int) -> list[dict[str, Tensor]]:
    with contextlib.closing(stream_of(task, model).batches(0)) as batches:
        found = itertools.islice(batches, num_batches)
        return [batch.part(0, task.batch_size, torch.device(task.device)) for batch in found]


def measure(task: Task, replies: TextIO) -> None:
    """Measure ours or, as the other side and in controls, the bare loop."""
    if task.side == "theirs" or task.engine == "bare":
        measure_work(task, replies, build=build_bare)
    else:
        run_ours(task, replies)


if __name__ == "__main__":
    prefer_huge_pages()  # as the ranks of a group do; here both sides
    serve_tasks(measure)
