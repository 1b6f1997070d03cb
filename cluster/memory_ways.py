"""The ways to hold a training in memory: every ZeRO stage with every offload, and the smallest change that fits.

None of them changes the result's fingerprint, so a training may go on in another way than it began.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from cluster.memory import RankMemory
from cluster.memory_plan import RankMemories
from stages.engine_settings import Offload, OptimizerOffload
from stages.errors import ConfigError
from stages.generator_config import GeneratorTraining
from stages.units import GIB

# Dearer from the first to the last: what is offloaded travels to the CPU and back in every step.
OFFLOADS: tuple[tuple[OptimizerOffload, Offload], ...] = (
    ("none", "none"),
    ("cpu", "none"),
    ("nvme", "none"),
    ("cpu", "cpu"),
    ("nvme", "cpu"),
)
ZeroStage = Literal[0, 1, 2, 3]
ZERO_STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A training's memory under DeepSpeed, in one way.

    Attributes:
        zero_stage: 0 to 3.
        offload_optimizer: where masters, moments and averages are.
        offload_parameters: where the weights are.
        memory: of a rank.
    """

    zero_stage: ZeroStage
    offload_optimizer: OptimizerOffload
    offload_parameters: Offload
    memory: RankMemory

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: bytes on the device, in the CPU's memory and in ``offload_dir``."""
        return {
            "zero_stage": self.zero_stage,
            "offload_optimizer": self.offload_optimizer,
            "offload_parameters": self.offload_parameters,
            "on_device": self.memory.on_device,
            "offloaded": self.memory.offloaded,
            "on_disk": self.memory.on_disk,
        }


def ways(config: GeneratorTraining, memories: RankMemories) -> list[Way]:
    """Estimate a training's ranks under every ZeRO stage, with every offload that the stage allows.

    Args:
        config: the training; its ranks and micro batches are kept.
        memories: of this training.
    """
    found = []
    for stage, (optimizer, parameters) in itertools.product(ZERO_STAGES, OFFLOADS):
        if stage < _least_stage(optimizer, parameters):
            continue
        changed = dataclasses.replace(
            config,
            engine="deepspeed",
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            # Where the files are makes no difference to how many bytes they take.
            offload_dir=(config.offload_dir or ".") if optimizer == "nvme" else None,
        )
        memory = memories.of(changed)
        found.append(Way(zero_stage=stage, offload_optimizer=optimizer, offload_parameters=parameters, memory=memory))
    return found


def check_fits(config: GeneratorTraining, limit_gib: float, place: str, memories: RankMemories) -> RankMemory:
    """Estimate a training's ranks as they are configured, and refuse what does not fit.

    Args:
        config: the training.
        limit_gib: what torch can use of one GPU.
        place: the stage, for messages.
        memories: of this training.

    Raises:
        ConfigError: with the smallest change that fits: the fewest settings, and of these the cheapest. None of them
            changes the result.
    """
    found = memories.of(config)
    limit = limit_gib * GIB
    if found.on_device <= limit:
        return found
    for changes in _smallest_first(config):
        smaller = memories.of(dataclasses.replace(config, **changes))
        if smaller.on_device <= limit:
            options = " ".join(f"-s {place}.{name}={value}" for name, value in changes.items())
            remedy = f"the smallest change that fits: {options} ({smaller.on_device / GIB:.1f} GiB)"
            break
    else:
        is_parted = config.engine == "deepspeed"
        least = " under ZeRO 3 with all offloaded" if is_parted else ""
        instead = "larger GPUs" if is_parted else f"engine: deepspeed (-s {place}.engine=deepspeed) or larger GPUs"
        remedy = f"nor does it fit in micro batches of 1{least}; take {instead}"
    raise ConfigError(
        f"{place}: a rank takes {found.on_device / GIB:.1f} GiB of GPU memory, more than the {limit_gib:g} GiB of "
        f"gpu_memory_gib; {remedy}"
    )


def _smallest_first(config: GeneratorTraining) -> list[dict[str, Any]]:
    """List what to change: few settings before many, cheap ones before dear ones.

    More ranks are none of it: what they would part further can be offloaded, and that takes no GPUs.
    """
    now = (config.offload_optimizer, config.offload_parameters)
    # Files are for those who chose them: on the GPU they save no more than the CPU's memory does.
    offloads = [now, *(way for way in OFFLOADS[OFFLOADS.index(now) + 1 :] if "nvme" not in way)]
    num_local = config.global_batch_size // config.num_ranks
    size = config.micro_batch_size or num_local
    sizes = [size // 2**power for power in range(size.bit_length()) if num_local % (size // 2**power) == 0]
    found = []
    for stage, (optimizer, parameters), smaller in itertools.product(_stages(config), offloads, sizes):
        if (optimizer, parameters) != now and not _is_allowed(config, stage, optimizer, parameters):
            continue
        wanted = {"zero_stage": stage, "offload_optimizer": optimizer, "offload_parameters": parameters}
        changes = {name: value for name, value in wanted.items() if value != getattr(config, name)}
        changes |= {"micro_batch_size": smaller} if smaller != size else {}
        found.append(((len(changes), offloads.index((optimizer, parameters)), stage, -smaller), changes))
    return [changes for _, changes in sorted(found, key=itemgetter(0)) if changes]


def _stages(config: GeneratorTraining) -> tuple[ZeroStage, ...]:
    """Return the ZeRO stages from the configured one on; plain torch has none."""
    return ZERO_STAGES[config.zero_stage :] if config.engine == "deepspeed" else (config.zero_stage,)


def _is_allowed(config: GeneratorTraining, stage: int, optimizer: OptimizerOffload, parameters: Offload) -> bool:
    return config.engine == "deepspeed" and stage >= _least_stage(optimizer, parameters)


def _least_stage(optimizer: OptimizerOffload, parameters: Offload) -> int:
    return 3 if parameters != "none" else 1 if optimizer != "none" else 0
