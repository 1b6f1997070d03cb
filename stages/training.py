"""The training loop, written out once. Trainings differ by a model, a loss function and a stream, never by a subclass.

Everything random in step k is a function of (seed, k, global sample index), and the position in the data is the step,
so a training that is killed and resumed does what an undisturbed one does.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from stages.base import Progress
from stages.checkpoints import CheckpointFolder
from stages.data_watch import DataWatch
from stages.dataset import Batch, Stream
from stages.determinism import deterministic
from stages.engine import Engine, EngineFactory, LossFunction, MicroBatch, gather_from_ranks, position
from stages.errors import StageError
from stages.insight import NOTHING_TO_WATCH, Insight, Seen, Watch
from stages.metrics import METRICS_NAME, MetricsLog, MetricsWindow, read_metrics
from stages.out_of_memory import out_of_memory_explained
from stages.rollback import RollbackHistory, Rollbacks
from stages.saving import Saver
from stages.step_guard import GUARD_NAME, StepGuard
from stages.stragglers import StragglerWatch
from stages.training_config import TrainingConfig, engine_settings, learning_rate_at
from stages.wandb_log import WandbLog
from stages.watchdog import Watchdog
from unclip_models.randomness import SampleRandom

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.5


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Attributes:
        weights: averaged weights by parameter name, float32 on the CPU; on the first rank only.
        metrics: the numbers logged at the step they are of, likewise.
        metrics_log: all JSON lines, likewise.
        step: of these weights: the last, or the best validated one if the training may stop early.
    """

    weights: Mapping[str, Tensor] | None
    metrics: Mapping[str, float]
    metrics_log: bytes
    step: int


class TrainingStoppedError(StageError):
    """The training was asked to stop; it wrote a checkpoint first."""


def model_loss(
    model: nn.Module, batch: Mapping[str, Tensor], random: SampleRandom
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Ask the model for its loss: the loss function of every model of ``unclip_models``."""
    loss: Callable[..., tuple[Tensor, Mapping[str, Tensor]]] = model.loss  # type: ignore[assignment]
    return loss(batch, random)


def train(
    model: nn.Module,
    stream: Stream,
    config: TrainingConfig,
    *,
    make_engine: EngineFactory,
    seed: int,
    folder: str,
    place: str,
    loss: LossFunction = model_loss,
    num_timesteps: int | None = None,
    watch: Watch = NOTHING_TO_WATCH,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train a model to its last step, from the newest whole checkpoint if there is one.

    Every rank of a training group calls this with the same arguments.

    Args:
        model: freshly built with the same weights on every rank; it belongs to the engine from here on.
        stream: the data.
        config: the settings.
        make_engine: builds the engine on this rank.
        seed: of everything random.
        folder: URI of the training's own folder, for checkpoints and live metrics.
        place: the stage, for messages.
        loss: the loss function.
        num_timesteps: of the diffusion, to split the loss by timestep quartile.
        watch: held-out samples and the like, to look at the training with.
        report: gets signs of life twice a second, on the first rank.
        should_stop: asked after every step; once it says yes on any rank, all ranks write a checkpoint and stop.
            SIGTERM and Ctrl-C do the same where this runs in the main thread.

    Raises:
        TrainingStoppedError: after a request to stop.
        StageError: if ``max_nonfinite_steps`` in a row were bad and no rollback is left.
    """
    shapes = {name: param.shape for name, param in model.named_parameters() if param.requires_grad}
    rank, world_size = position()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopRequest(should_stop))
        stack.enter_context(out_of_memory_explained(config, world_size, place))
        stack.enter_context(deterministic(config.deterministic, place))
        watchdog = stack.enter_context(_watchdog(config, folder, place))
        settings = engine_settings(config, world_size)
        engine = make_engine(model, loss, settings)
        stack.callback(engine.close)
        checkpoints = CheckpointFolder(folder, config.keep_last, config.keep_every_steps)
        rollbacks = _rollbacks(engine, checkpoints, config, folder, place)
        stragglers = StragglerWatch(engine, place, config.straggler_ratio)
        last_step: int | None = None
        while last_step is None:  # once, and again after every rollback, which leaves the folder as a kill would
            watchdog.enter("start", 0)
            with contextlib.ExitStack() as attempt:
                resumed = checkpoints.resume(engine)
                first_step = resumed.step if resumed else 0
                if resumed and rank == 0:
                    logger.info("%s: resuming from step %d of %d", place, first_step, config.num_steps)
                content = resumed.metrics if resumed else b""
                log = _open_log(attempt, folder, place, config, content, first_step) if rank == 0 else None
                lines = read_metrics(content)
                num_skipped = int(lines[-1]["num_skipped_steps"]) if lines else 0
                window = MetricsWindow(config.global_batch_size, num_timesteps, num_skipped)
                num_bad = int(lines[-1].get("num_bad_samples", 0)) if lines else 0
                data_watch = DataWatch(vars(config), place, num_bad)
                saver = Saver(
                    checkpoints,
                    engine,
                    place=place,
                    newest=resumed.step if resumed else None,
                    in_background=config.checkpoint_in_background,
                    max_failures=config.max_failed_saves,
                )
                attempt.callback(saver.close)
                insight = Insight(
                    config,
                    watch,
                    engine,
                    micro_batch_size=settings.micro_batch_size,
                    num_timesteps=num_timesteps,
                    lines=lines,
                )
                if (best := insight.best_step) is not None:
                    # A rollback comes to where an older step was the best, which a later one may have pushed out.
                    insight.choose_among(engine.gather(checkpoints.steps())[0])
                    if rank == 0 and insight.best_step != best:
                        now_best = insight.best_step
                        logger.warning("%s: step %d, the best, has no checkpoint; now: %s", place, best, now_best)
                guard = StepGuard(config.spike_threshold, config.spike_window, resumed.guard if resumed else b"")
                history = rollbacks.history(first_step)
                if history.rollbacks and history.rollbacks[-1].to_step == first_step:
                    guard.bad_steps.clear()  # of the stretch gone back from, whose data is behind: counting starts anew
                batches = attempt.enter_context(
                    contextlib.closing(stream.batches(first_step + history.data_offset, rank, world_size))
                )
                loop = _Loop(
                    *(engine, config, seed, place, window, data_watch, saver, guard, history, rollbacks),
                    *(stragglers, watchdog, log, insight, report, stop),
                )
                last_step = loop.run(batches, first_step)
        step = insight.best_step or last_step
        if log is None:
            return Trained(None, {}, b"", step)
        line = next(line for line in reversed(read_metrics(log.content)) if line["step"] == step)
        metrics = {name: value for name, value in line.items() if name != "step" and value is not None}
        return Trained(checkpoints.weights(step, shapes), metrics, log.content, step)


def _watchdog(config: TrainingConfig, folder: str, place: str) -> Watchdog:
    rank, world_size = position()
    session = gather_from_ranks(time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), world_size)[0]
    return Watchdog(folder, place, rank=rank, world_size=world_size, session=session, timeout_s=config.hang_timeout_s)


def _rollbacks(
    engine: Engine, checkpoints: CheckpointFolder, config: TrainingConfig, folder: str, place: str
) -> Rollbacks:
    return Rollbacks(
        engine=engine,
        checkpoints=checkpoints,
        folder=folder,
        place=place,
        max_rollbacks=config.max_rollbacks,
        learning_rate_factor=config.rollback_learning_rate_factor,
        checkpoint_every_steps=config.checkpoint_every_steps,
    )


def _open_log(
    stack: contextlib.ExitStack, folder: str, place: str, config: TrainingConfig, lines: bytes, first_step: int
) -> MetricsLog:
    wandb = WandbLog(config.wandb, folder, place, asdict(config)) if config.wandb.project else None
    log = MetricsLog(folder, lines=lines, first_step=first_step, tensorboard=config.tensorboard, wandb=wandb)
    stack.callback(log.close)
    return log


@dataclass
class _Loop:
    """The loop with what it needs."""

    engine: Engine
    config: TrainingConfig
    seed: int
    place: str
    window: MetricsWindow
    watch: DataWatch
    saver: Saver
    guard: StepGuard
    history: RollbackHistory
    rollbacks: Rollbacks
    stragglers: StragglerWatch
    watchdog: Watchdog
    log: MetricsLog | None
    insight: Insight
    report: Callable[[Progress], None]
    stop: _StopRequest
    lost: dict[str, float] = field(default_factory=dict)  # what the next line has to tell of failed saves
    saved_at: float = field(default_factory=time.monotonic)
    loss_scale: float = 1.0

    def run(self, batches: Iterator[Batch], first_step: int) -> int | None:
        """Do the steps ``first_step .. num_steps - 1``, or fewer, with a checkpoint after the last.

        Returns:
            Steps done at the end; None if the training was rolled back and has to be resumed.
        """
        config, engine, guard, history = self.config, self.engine, self.guard, self.history
        reporter = _Reporter(self.report, config)
        done = first_step
        for step in range(first_step, config.num_steps):
            if self.insight.has_ended:
                logger.info("%s: stopped early after step %d; best: %s", self.place, done, self.insight.best_step)
                break
            self.watchdog.enter("data", step)
            waited_from = time.monotonic()
            batch = next(batches)
            waited_s = time.monotonic() - waited_from
            assert batch.step == step + history.data_offset, f"the stream gave step {batch.step} for step {step}"
            self.watch.took(batch, waited_s)
            learning_rate = learning_rate_at(config, step) * history.learning_rate_scale
            self.watchdog.enter("step", step)
            result = engine.step(self._micro_batches(batch), learning_rate, guard.accepts)
            self.loss_scale = result.loss_scale
            self.window.add(result.loss, result.grad_norm, result.applied, result.terms, waited_s)
            guard.add(step, result)
            self.stragglers.add(result.compute_s, waited_s)
            self.watchdog.step_done()
            done = step + 1
            if len(guard.bad_steps) >= config.max_nonfinite_steps:
                self.saver.finish()  # what is under way may be what there is to go back to
                self.rollbacks.go_back(history, done, guard.bad_steps)
                return None
            if engine.rank == 0:
                reporter.step_done(done, result.loss, waited_s)
            self.watchdog.enter("insight", done)
            seen = self.insight.look(done)
            stopping, due = self._agree()
            self._note_lost(done)  # which may make this step the best, or the last
            is_last = done == config.num_steps or self.insight.has_ended
            due = due or done % config.checkpoint_every_steps == 0 or done == self.insight.best_step
            self._keep(done, learning_rate, seen, saving=due, ending=is_last or stopping)
            if stopping and not is_last:
                raise TrainingStoppedError(
                    f"{self.place}: stopped on request after step {done} of {config.num_steps}; run again to resume"
                )
        return done

    def _keep(self, done: int, learning_rate: float, seen: Seen, *, saving: bool, ending: bool) -> None:
        """Log and save what is due after a step; a checkpoint holds the numbers of all its steps."""
        saving = saving or ending
        self.window.pause(seen.seconds or 0.0)
        if self.log is not None and seen.picture is not None:
            self.log.show(done, seen.picture)
        if saving:
            self.watchdog.enter("checkpoint", done)
            began_at = time.monotonic()
            self.saver.finish()
            self.window.add_saving(time.monotonic() - began_at)
            self._note_lost(done)
            ending = ending or self.insight.has_ended
        if saving or seen.seconds is not None or done % self.config.log_every_steps == 0:
            self.watchdog.enter("log", done)
            metrics = self.window.close(self.engine, learning_rate) | self.stragglers.close()
            metrics |= self.watch.close(self.engine, done)
            metrics |= self.insight.machine(metrics["samples_per_s"]) | dict(seen.numbers)
            metrics |= self.lost | {
                "num_spikes": float(self.guard.num_spikes),
                "num_rollbacks": float(len(self.history.rollbacks)),
            }
            self.lost.clear()
            if self.config.precision == "fp16":
                metrics["loss_scale"] = self.loss_scale
            if self.log is not None:
                self.log.write(done, dict(sorted(metrics.items())))
        if saving:
            self.watchdog.enter("checkpoint", done)
            extra = {}
            if self.log is not None:
                extra = {METRICS_NAME: self.log.content, GUARD_NAME: self.guard.to_json()}
            began_at = time.monotonic()
            self.saver.spare(self.insight.best_step)
            self.saver.save(done, extra, wait=ending)
            self.saved_at = time.monotonic()
            self.window.add_saving(self.saved_at - began_at)

    def _note_lost(self, done: int) -> None:
        """Take in which saves have failed; no save is under way then, or none has failed."""
        self.lost |= self.insight.lose(self.saver.take_failed(), done)

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        """Cut a rank's batch into micro batches on the engine's device, each with its randomness."""
        size = self.config.micro_batch_size or len(batch.indices)
        for first in range(0, len(batch.indices), size):
            indices = batch.indices[first : first + size]
            random = SampleRandom(self.seed, batch.step, indices, self.engine.device)
            yield batch.part(first, first + size, self.engine.device), random

    def _agree(self) -> tuple[bool, bool]:
        """Let all ranks know whether any was asked to stop, and whether the first finds that a checkpoint is due.

        A checkpoint whose files all ranks have written meanwhile is made to count.
        """
        every = self.config.checkpoint_every_minutes
        due = self.engine.rank == 0 and every is not None and time.monotonic() - self.saved_at > every * 60
        mine = torch.tensor([self.stop(), due, self.saver.ready], dtype=torch.float64)
        stopping, due, num_ready = self.engine.total(mine).tolist()
        if num_ready == self.engine.world_size:
            self.saver.finish()
        return stopping > 0, due > 0


class _Reporter:
    """Progress of the first rank, at most twice a second."""

    def __init__(self, report: Callable[[Progress], None], config: TrainingConfig) -> None:
        self._report = report
        self._config = config
        self._reported_at = time.monotonic()
        self._num_since = 0
        self._waited_s = 0.0

    def step_done(self, done: int, loss: float, waited_s: float) -> None:
        """Count a step, and report if it is time."""
        self._num_since += 1
        self._waited_s += waited_s
        elapsed_s = time.monotonic() - self._reported_at
        if elapsed_s < _REPORT_EVERY_S and done < self._config.num_steps:
            return
        numbers = {
            "samples_per_s": self._num_since * self._config.global_batch_size / max(elapsed_s, 1e-9),
            "data_wait": self._waited_s / max(elapsed_s, 1e-9),
        }
        if math.isfinite(loss):
            numbers["loss"] = loss
        self._report(Progress(done=done, total=self._config.num_steps, unit="steps", numbers=numbers))
        self._reported_at, self._num_since, self._waited_s = time.monotonic(), 0, 0.0


class _StopRequest:
    """Whether the training should stop: asked for by the caller, or by SIGTERM or Ctrl-C in the main thread.

    A signal is held back until the checkpoint is written; on leaving it is raised again, for whoever handled it before.
    A second Ctrl-C interrupts at once.
    """

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Tell whether to stop."""
        return self._received is not None or self._should_stop()

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self._received is not None:
            signal.raise_signal(self._received)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
