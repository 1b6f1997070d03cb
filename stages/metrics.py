"""The numbers of a training: JSON lines, one per logged step, and the same in TensorBoard.

The lines are the record: they are kept with every checkpoint, so a resumed training goes on from exactly the lines of
the checkpoint it resumed from. What is shown while the training runs lies in its folder::

    <folder>/metrics.jsonl       published every few seconds
    <folder>/samples/            grids of samples, step-000123.png
    <folder>/tensorboard/        event files; copied there now and then if the store is remote
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import storage
from stages.errors import StorageError
from stages.pictures import Pixels, encode_png
from stages.wandb_log import WandbLog

if TYPE_CHECKING:
    from torch import Tensor

    from stages.engine import Engine

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples"
TENSORBOARD_NAME = "tensorboard"
_PUBLISH_EVERY_S = 20.0
_PUBLISH_FRACTION = 0.01  # of a training's time, which showing its metrics may take
_PICTURE = re.compile(r"step-(\d+)\.png")
_NUM_QUARTILES = 4
TIMESTEP_TERMS = ("t", "timestep")


class MetricsLog:
    """The metrics of one training; used by its first rank only.

    Args:
        folder: URI of the training's folder.
        lines: those of the checkpoint the training resumes from.
        first_step: step it resumes from; TensorBoard forgets later ones.
        tensorboard: whether to write event files too.
        wandb: a run in W&B to write to as well.
    """

    def __init__(
        self,
        folder: str,
        *,
        lines: bytes = b"",
        first_step: int = 0,
        tensorboard: bool = True,
        wandb: WandbLog | None = None,
    ) -> None:
        self._folder = folder
        self._wandb = wandb
        self._lines = bytearray(lines)
        self._publish_at = time.monotonic() + _PUBLISH_EVERY_S
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._writer: Any = self._open_tensorboard(first_step) if tensorboard else None

    @property
    def content(self) -> bytes:
        """All lines so far."""
        return bytes(self._lines)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add one line: ``step`` and the numbers; those that are not finite become null, for lack of a word in JSON."""
        values = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._lines += json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n"

        def draw(writer: Any) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        self._to_tensorboard(draw)
        if self._wandb is not None:
            self._wandb.write(step, values)
        if time.monotonic() > self._publish_at:
            self.publish()

    def show(self, step: int, picture: Pixels) -> None:
        """Publish a grid of samples, uint8 ``(H, W, 3)``; a store that fails is no reason to stop the training."""
        uri = storage.join(self._folder, SAMPLES_NAME, f"step-{step:06d}.png")
        try:
            storage.write_bytes(uri, encode_png(picture, {"step": str(step)}))
        except StorageError as error:
            logger.warning("the samples of step %d cannot be shown: %s", step, error)
        self._to_tensorboard(lambda writer: writer.add_image("samples", picture, step, dataformats="HWC"))
        if self._wandb is not None:
            self._wandb.show(step, picture)

    def publish(self) -> None:
        """Show the present state in the training's folder; a store that fails is no reason to stop the training."""
        started_at = time.monotonic()
        try:
            self._publish()
        except (StorageError, OSError) as error:
            logger.warning("the metrics cannot be shown at present: %s", error)
        # All that there is is written, more with every line, while the steps wait: let it cost them little.
        ended_at = time.monotonic()
        self._publish_at = ended_at + max(_PUBLISH_EVERY_S, (ended_at - started_at) / _PUBLISH_FRACTION)

    def _publish(self) -> None:
        self._to_tensorboard(lambda writer: writer.flush())
        storage.write_bytes(storage.join(self._folder, METRICS_NAME), self.content)
        if self._scratch is not None:
            for path in sorted(Path(self._scratch.name).iterdir()):
                storage.upload(path, storage.join(self._folder, TENSORBOARD_NAME, path.name))

    def close(self) -> None:
        """Publish a last time and release the writer."""
        self.publish()
        self._to_tensorboard(lambda writer: writer.close())
        if self._wandb is not None:
            self._wandb.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _to_tensorboard(self, call: Callable[[Any], None]) -> None:
        """Call TensorBoard's writer, a thread of its own: what failed there is raised at the next call, for good."""
        if self._writer is None:
            return
        try:
            call(self._writer)
        except OSError as error:
            self._writer = None
            logger.warning("TensorBoard gets no more numbers until the training is started again: %s", error)

    def _open_tensorboard(self, first_step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports, in training processes only

        if storage.is_local(self._folder):
            directory = storage.join(self._folder, TENSORBOARD_NAME)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="unclip-tensorboard-")
            directory = self._scratch.name
        try:
            return SummaryWriter(directory, purge_step=first_step or None)
        except OSError as error:
            logger.warning("TensorBoard gets no numbers: %s", error)
            return None


class MetricsWindow:
    """Numbers of the steps since the last logged line.

    Args:
        global_batch_size: samples per step over all ranks.
        num_timesteps: of the diffusion, to split the loss by timestep quartile; None for other models.
        num_skipped: steps skipped before, by the training that is resumed.
    """

    def __init__(self, global_batch_size: int, num_timesteps: int | None, num_skipped: int = 0) -> None:
        self._global_batch_size = global_batch_size
        self._num_timesteps = num_timesteps
        self._num_skipped = num_skipped
        self._restart()

    def _restart(self) -> None:
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._terms: list[Mapping[str, Tensor]] = []
        self._waited_s = 0.0
        self._saving_s = 0.0
        self._paused_s = 0.0
        self._started_at = time.monotonic()

    def add(self, loss: float, grad_norm: float, applied: bool, terms: Mapping[str, Tensor], waited_s: float) -> None:
        """Take in one step; steps that were skipped count as skipped alone."""
        self._waited_s += waited_s
        if not applied:
            self._num_skipped += 1
            return
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._terms.append(terms)

    def add_saving(self, seconds: float) -> None:
        """Take in what the steps lost to a checkpoint."""
        self._saving_s += seconds

    def pause(self, seconds: float) -> None:
        """Leave time that was not spent on steps, but on looking at the model, out of the rates."""
        self._paused_s += seconds

    def close(self, engine: Engine, learning_rate: float) -> dict[str, float]:
        """Average over the window and all ranks (collective), and start the next one."""
        import torch

        elapsed_s = max(time.monotonic() - self._started_at - self._paused_s, 1e-9)
        num_steps = max(1, len(self._losses))
        sums = term_sums(self._terms, self._num_timesteps)
        totals = engine.total(torch.tensor([*sums.values(), self._waited_s], dtype=torch.float64)).tolist()
        numbers = {
            "loss": sum(self._losses) / num_steps if self._losses else math.nan,
            "grad_norm": sum(self._grad_norms) / num_steps if self._grad_norms else math.nan,
            "learning_rate": learning_rate,
            "samples_per_s": num_steps * self._global_batch_size / elapsed_s,
            "data_wait_fraction": totals[-1] / engine.world_size / elapsed_s,
            "checkpoint_wait_fraction": self._saving_s / elapsed_s,
            "num_skipped_steps": float(self._num_skipped),
        }
        numbers |= means_of(dict(zip(sums, totals[:-1], strict=True)))
        self._restart()
        return dict(sorted(numbers.items()))


def term_sums(terms: Sequence[Mapping[str, Tensor]], num_timesteps: int | None) -> dict[str, float]:
    """Sum per-sample terms; the same keys on every rank, whatever the samples.

    Args:
        terms: of micro batches, each ``(B,)`` by name.
        num_timesteps: of the diffusion, to split the loss by timestep quartile; None for other models.

    Returns:
        For every term, and every quartile of the loss, ``<name>/sum`` and ``<name>/count``.
    """
    import torch

    sums: dict[str, float] = {}
    names = terms[0].keys() if terms else ()
    columns = {name: torch.cat([term[name].reshape(-1) for term in terms]).double().cpu() for name in names}
    t = next((columns.pop(name) for name in TIMESTEP_TERMS if name in columns), None)
    for name, values in columns.items():
        if name != "loss":
            sums |= {f"{name}/sum": float(values.sum()), f"{name}/count": float(len(values))}
    measured = columns.get("loss", columns.get("mse"))
    if t is not None and measured is not None and num_timesteps:
        quartile = (t * _NUM_QUARTILES / num_timesteps).long()
        for q in range(_NUM_QUARTILES):
            chosen = measured[quartile == q]
            name = f"loss_quartile_{q + 1}"
            sums |= {f"{name}/sum": float(chosen.sum()), f"{name}/count": float(len(chosen))}
    return sums


def means_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide the sums of ``term_sums`` by their counts; what was never counted is left out."""
    names = (key.removesuffix("/sum") for key in sums if key.endswith("/sum"))
    return {name: sums[f"{name}/sum"] / sums[f"{name}/count"] for name in names if sums[f"{name}/count"] > 0}


def last_picture(folder: str) -> tuple[int, bytes] | None:
    """Return the last grid of samples in a training's folder, and after which step it was drawn; None without one."""
    names = storage.list_files(storage.join(folder, SAMPLES_NAME))
    steps = {int(match[1]): name for name in names if (match := _PICTURE.fullmatch(name))}
    if not steps:
        return None
    step = max(steps)
    return step, storage.read_bytes(storage.join(folder, SAMPLES_NAME, steps[step]))


def read_metrics(content: bytes) -> list[dict[str, float]]:
    """Parse JSON lines back into one mapping per logged step."""
    return [json.loads(line) for line in content.splitlines()]
