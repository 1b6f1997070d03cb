"""The state of a training on one rank: weights, moving averages and moments, and their files.

Every engine keeps float32 master weights in flat tensors. A ``Fragment`` says which stretch of which parameter lies
where, and a file holds the stretches by name. One format therefore serves every engine, ZeRO stage and number of ranks;
another world size reads the same checkpoint. Files are safetensors: reading one executes nothing.

Buffers of the model are not kept: in these models they are constants, set before the training starts.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.adamw import FlatAdamW
from stages.errors import IntegrityError
from stages.loss_scale import LossScale
from stages.mapped_memory import Allocate
from unclip_models.ema import ema_update, warmed_up_decay

# What is kept of every weight: the weight itself, its moving average, and Adam's two moments.
KINDS = ("param", "ema", "exp_avg", "exp_avg_sq")
_EXCHANGED = 1 << 24  # elements swapped at once: 64 MiB of memory beside weights and averages
_SIZE_BYTES, _MOST_OF_A_HEAD = 8, 100_000_000  # of safetensors: the size of the head in front of it, and its limit
RANK_FILE = re.compile(r"rank-\d{4}\.safetensors")


def rank_file(rank: int) -> str:
    """Return the name of a rank's state file."""
    return f"rank-{rank:04d}.safetensors"


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
        save_file(dict(self.tensors), folder / rank_file(self.rank), metadata=metadata)


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

    def needed(self, files: Mapping[str, Mapping[str, int]]) -> list[str]:
        """See ``Engine.needed``."""
        targets = self._targets()
        found = {}
        for file, stretches in files.items():
            parts = ((*split_key(key), length) for key, length in stretches.items())
            found[file] = sum(
                max(0, min(start + length, f.start + f.length) - max(start, f.start))
                for kind, name, start, length in parts
                if kind == KINDS[0]  # every kind is kept of every stretch
                for f in targets.get(name, ())
            )
        if sum(found.values()) != sum(f.length for f in self.fragments):
            return list(files)  # something is missing or was misread: to load all tells what
        return [file for file in files if found[file]] or list(files)[:1]  # which also counts the updates

    def load(self, files: Sequence[Path]) -> None:
        """Fill every fragment from the files; see ``Engine.load``."""
        targets = self._targets()
        for master in self.masters:
            self.optimizer.reset(master)
        wanted = sum(f.length for f in self.fragments) * len(KINDS)
        covered = 0
        for path in files:
            with _opened(path) as file:
                self.num_updates = int(file.metadata()["num_updates"])
                if self.loss_scale is not None:
                    self.loss_scale.load(file.metadata())
                for key in file.keys():  # noqa: SIM118 - not a dict
                    kind, name, start = split_key(key)
                    covered += sum(self._copy(file, key, kind, start, f) for f in targets.get(name, ()))
        if covered != wanted:
            raise IntegrityError(
                f"checkpoint files {[path.name for path in files]} hold {covered} of the {wanted} numbers that this "
                "model needs; they belong to another model"
            )
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(float(self.num_updates))

    def _targets(self) -> dict[str, list[Fragment]]:
        """Return the fragments by parameter."""
        found: dict[str, list[Fragment]] = {}
        for fragment in self.fragments:
            found.setdefault(fragment.name, []).append(fragment)
        return found

    def _copy(self, file: Any, key: str, kind: str, start: int, target: Fragment) -> int:
        """Copy where a stored stretch and a fragment overlap; return how many elements that were."""
        stored = file.get_slice(key)
        length: int = stored.get_shape()[0]
        first = max(start, target.start)
        last = min(start + length, target.start + target.length)
        if first >= last:
            return 0
        self._stretch(kind, target)[first - target.start : last - target.start].copy_(
            stored[first - start : last - start]
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


def split_key(key: str) -> tuple[str, str, int]:
    """Split the name of a stored stretch into kind, parameter and first element."""
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("/")
    return kind, name, int(start)


def stored_stretches(read: Callable[[int, int], bytes]) -> dict[str, int]:
    """Read from the head of a state file, and nothing else of it, which stretches it holds: key -> elements.

    Args:
        read: gives the bytes of the file from its first argument to before its second.

    Raises:
        IntegrityError: if that is no head of a state file.
    """
    num_bytes = int.from_bytes(read(0, _SIZE_BYTES), "little")
    try:
        if num_bytes > _MOST_OF_A_HEAD:
            raise ValueError(f"of {num_bytes} bytes")
        head = json.loads(read(_SIZE_BYTES, _SIZE_BYTES + num_bytes))
        return {key: math.prod(entry["shape"]) for key, entry in head.items() if key != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"not the head of a state file ({error})") from error


def assemble(files: Sequence[Path], shapes: Mapping[str, torch.Size], kind: str = "ema") -> dict[str, Tensor]:
    """Put whole parameters together from the state files of all ranks.

    Args:
        files: of one checkpoint.
        shapes: parameter -> shape.
        kind: one of ``KINDS``.

    Raises:
        IntegrityError: if some elements are in no file.
    """
    whole = {name: torch.zeros(shape.numel(), dtype=torch.float32) for name, shape in shapes.items()}
    covered = dict.fromkeys(whole, 0)
    for path in files:
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                stored_kind, name, start = split_key(key)
                if stored_kind != kind or name not in whole:
                    continue
                values = file.get_tensor(key)
                whole[name][start : start + len(values)] = values
                covered[name] += len(values)
    if gaps := [name for name, shape in shapes.items() if covered[name] != shape.numel()]:
        raise IntegrityError(f"checkpoint lacks parts of {gaps[0]} and {len(gaps) - 1} more parameters; train again")
    return {name: whole[name].view(shape) for name, shape in shapes.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path}: not a whole state file ({error})") from error
