"""The state of a training on one rank: weights, moving averages and moments, and their way into a file and back.

Every engine keeps float32 master weights in flat tensors. A ``Fragment`` says which stretch of which parameter lies
where, and a file (``stages/state_file.py``) holds the stretches by name. One format therefore serves every engine, ZeRO
stage and number of ranks; another world size reads the same checkpoint.

Buffers of the model are not kept: in these models they are constants, set before the training starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.adamw import FlatAdamW
from stages.errors import IntegrityError
from stages.loss_scale import LossScale
from stages.mapped_memory import Allocate
from stages.state_file import StateFile, Stretch, rank_file, write_state
from unclip_models.ema import ema_update, warmed_up_decay

# What is kept of every weight: the weight itself, its moving average, and Adam's two moments.
KINDS = ("param", "ema", "exp_avg", "exp_avg_sq")
_EXCHANGED = 1 << 24  # elements swapped at once: 64 MiB of memory beside weights and averages


@dataclass(frozen=True)
class Fragment:
    """A stretch of one parameter inside a rank's flat tensors.

    Attributes:
        name: the parameter.
        start: its first element here, counted in the flattened parameter.
        flat: which flat tensor.
        offset: first element there.
        length: elements.
    """

    name: str
    start: int
    flat: int
    offset: int
    length: int


@dataclass(frozen=True)
class Snapshot:
    """A copy of one rank's state on the CPU: whatever the training does next, this stays.

    Attributes:
        rank: whose.
        tensors: ``<kind>/<parameter>/<first element>`` -> float32 stretch.
        num_updates: of the moving average.
        loss_scale: state of the loss scale, where there is one.
    """

    rank: int
    tensors: Mapping[str, Tensor]
    num_updates: int
    loss_scale: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write the rank's file into a local folder."""
        metadata = {"num_updates": str(self.num_updates), **self.loss_scale}
        write_state(folder / rank_file(self.rank), self.tensors, metadata)


class ShardedState:
    """Master weights, moments and moving averages of one rank, with their way into a file and back.

    Args:
        masters: the tensors the optimizer updates, float32, contiguous.
        fragments: what lies where in them.
        optimizer: AdamW over ``masters``.
        ema_decay: of the moving average.
        loss_scale: of fp16; None: there is none.
        zeros_elsewhere: makes the moving averages and the copies of snapshots elsewhere than in memory; None: they are
            beside the masters, and in the CPU's memory.
    """

    def __init__(
        self,
        masters: Sequence[Tensor],
        fragments: Sequence[Fragment],
        optimizer: FlatAdamW,
        ema_decay: float,
        loss_scale: LossScale | None = None,
        zeros_elsewhere: Allocate | None = None,
    ) -> None:
        self.masters = list(masters)
        self.fragments = tuple(fragments)
        self.optimizer = optimizer
        self.ema_decay = ema_decay
        self.loss_scale = loss_scale
        self._zeros_elsewhere = zeros_elsewhere
        self.num_updates = 0
        self.averages = [self._clone(master.detach()) for master in self.masters]

    def update_average(self) -> None:
        """Take the present weights into the moving average; called once after every applied step."""
        ema_update(self.averages, self.masters, warmed_up_decay(self.ema_decay, self.num_updates))
        self.num_updates += 1

    def snapshot(self, rank: int) -> Snapshot:
        """Copy every fragment of every kind to the CPU; whole tensors at a time, which is as fast as memory allows.

        Raises:
            StorageError: if copies lie on a disk, and it is full.
        """
        tensors: dict[str, Tensor] = {}
        for kind in KINDS:
            copies = [self._cpu_copy(self._flat(kind, i)).view(-1) for i in range(len(self.masters))]
            for f in self.fragments:
                tensors[f"{kind}/{f.name}/{f.start}"] = copies[f.flat][f.offset : f.offset + f.length]
        return Snapshot(rank, tensors, self.num_updates, self.loss_scale.to_metadata() if self.loss_scale else {})

    def exchange(self) -> None:
        """Swap weights and moving averages in place; to do so twice changes no bit."""
        for master, average in zip(self.masters, self.averages, strict=True):
            parts = zip(master.detach().view(-1).split(_EXCHANGED), average.view(-1).split(_EXCHANGED), strict=True)
            for weights, averages in parts:
                kept = weights.clone()
                weights.copy_(averages)
                averages.copy_(kept)

    def needed(self, files: Mapping[str, Sequence[Stretch]]) -> list[str]:
        """See ``Engine.needed``."""
        targets = self._targets()
        found = {
            file: sum(
                max(0, last - first)
                for stretch in stretches
                if stretch.kind == KINDS[0]  # every kind is kept of every stretch
                for f in targets.get(stretch.name, ())
                for first, last in [_overlap(f, stretch.start, stretch.end - stretch.begin)]
            )
            for file, stretches in files.items()
        }
        if sum(found.values()) != sum(f.length for f in self.fragments):
            return list(files)  # something is missing or was misread: to load all tells what
        return [file for file in files if found[file]] or list(files)[:1]  # which also counts the updates

    def load(self, files: Iterable[StateFile]) -> None:
        """Fill every fragment from the files, one after another; see ``Engine.load``."""
        targets = self._targets()
        for master in self.masters:
            self.optimizer.reset(master)

        def take(kind: str, name: str, start: int, values: Tensor) -> int:
            return sum(self._copy(values, kind, start, fragment) for fragment in targets.get(name, ()))

        wanted = sum(f.length for f in self.fragments) * len(KINDS)
        covered = 0
        for file in files:
            num_taken, metadata = file.read(take)
            covered += num_taken
            self.num_updates = int(metadata["num_updates"])
            if self.loss_scale is not None:
                self.loss_scale.load(metadata)
        if covered != wanted:
            raise IntegrityError(
                f"the checkpoint's files hold {covered} of the {wanted} numbers that this model needs; they belong to "
                "another model"
            )
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(float(self.num_updates))

    def _targets(self) -> dict[str, list[Fragment]]:
        """Return the fragments by parameter."""
        found: dict[str, list[Fragment]] = {}
        for fragment in self.fragments:
            found.setdefault(fragment.name, []).append(fragment)
        return found

    def _copy(self, values: Tensor, kind: str, start: int, target: Fragment) -> int:
        """Copy where stored numbers and a fragment overlap; return how many elements that were."""
        first, last = _overlap(target, start, len(values))
        if first >= last:
            return 0
        self._stretch(kind, target)[first - target.start : last - target.start].copy_(
            values[first - start : last - start]
        )
        return last - first

    def _stretch(self, kind: str, fragment: Fragment) -> Tensor:
        flat = self._flat(kind, fragment.flat)
        return flat.view(-1)[fragment.offset : fragment.offset + fragment.length]

    def _flat(self, kind: str, index: int) -> Tensor:
        master = self.masters[index]
        if kind == "param":
            return master.detach()
        if kind == "ema":
            return self.averages[index]
        moments = self.optimizer.state.get(master) or {}
        return moments[kind] if kind in moments else torch.zeros_like(master)

    def _clone(self, values: Tensor) -> Tensor:
        return values.clone() if self._zeros_elsewhere is None else self._zeros_elsewhere(values).copy_(values)

    def _cpu_copy(self, values: Tensor) -> Tensor:
        return values.to("cpu", copy=True) if self._zeros_elsewhere is None else self._clone(values)


def _overlap(fragment: Fragment, start: int, length: int) -> tuple[int, int]:
    """Return which elements of the parameter lie both in a fragment and in a stretch; none if the first is not less."""
    return max(start, fragment.start), min(start + length, fragment.start + fragment.length)


def assemble(files: Iterable[StateFile], shapes: Mapping[str, torch.Size], kind: str = "ema") -> dict[str, Tensor]:
    """Put whole parameters together from the state files of all ranks; float32, on the CPU.

    Args:
        files: of one checkpoint.
        shapes: parameter -> shape.
        kind: one of ``KINDS``.

    Raises:
        IntegrityError: if a file is damaged, or some elements are in none.
        StorageError: if a file cannot be read.
    """
    whole = {name: torch.zeros(shape.numel(), dtype=torch.float32) for name, shape in shapes.items()}

    def take(stored_kind: str, name: str, start: int, values: Tensor) -> int:
        if stored_kind != kind or name not in whole:
            return 0
        room = whole[name][start : start + len(values)]  # less, if the file's head is damaged: its checksum will tell
        room.copy_(values[: len(room)])
        return len(room)

    covered = sum(file.read(take)[0] for file in files)
    if covered != (wanted := sum(len(values) for values in whole.values())):
        raise IntegrityError(f"the checkpoint holds {covered} of the {wanted} weights of this model; train again")
    return {name: whole[name].view(shape) for name, shape in shapes.items()}
