"""The settings that every training has, and what follows from them: the learning rate of a step, the engine's part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stages.base import Placement, Resources, setting
from stages.deepspeed_keys import check_overrides
from stages.engine_settings import EngineSettings, Offload, OptimizerOffload, Precision
from stages.errors import ConfigError
from stages.validation_config import SamplesConfig, ValidationConfig
from stages.wandb_log import WandbConfig

Schedule = Literal["constant", "cosine", "linear", "wsd"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings that every training has; what does not change the result is marked so."""

    seed: int | None = setting(None, "seed of this training; null: the run's", affects="nothing")  # identity has it
    num_steps: int = setting(1000, "optimizer steps")
    global_batch_size: int = setting(64, "samples per optimizer step, over all ranks")
    learning_rate: float = setting(1.2e-4, "AdamW's peak learning rate")
    learning_rate_schedule: Schedule = setting(
        "constant", "what follows the warm-up: `constant`, `cosine`, `linear`, or `wsd`: constant, then linear"
    )
    warmup_steps: int = setting(0, "steps in which the learning rate rises from 0")
    decay_fraction: float = setting(0.2, "of all steps: the decay at the end, with `wsd`")
    final_learning_rate_fraction: float = setting(0.0, "of the peak, to which the learning rate falls at the end")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay")
    beta1: float = setting(0.9, "AdamW's decay of the first moment")
    beta2: float = setting(0.999, "AdamW's decay of the second moment")
    eps: float = setting(1e-8, "AdamW's epsilon")
    gradient_clipping: float = setting(1.0, "largest global gradient norm")
    ema_decay: float = setting(0.9999, "of the moving average of the weights, which is what is exported")
    precision: Precision = setting(
        "fp32", "`fp32`; `bf16` or `fp16`: autocast over float32 weights, `fp16` with a dynamic loss scale"
    )
    num_streams: int = setting(8, "canonical data streams; the number of ranks must divide it")
    spike_threshold: float | None = setting(
        None,
        "skip steps whose loss or gradient norm lies so many robust standard deviations above the median; null: none",
    )
    spike_window: int = setting(100, "steps taken that a step is compared with to find a spike")

    engine: Literal["deepspeed", "torch"] = setting("deepspeed", "what drives the optimizer on Ray", affects="nothing")
    compile: bool = setting(False, "compile the network with torch.compile; needs a C++ compiler", affects="nothing")
    channels_last: bool = setting(False, "NHWC activations in U-Nets, for GPUs with `compile`", affects="nothing")
    zero_stage: Literal[0, 1, 2, 3] = setting(1, "states DeepSpeed partitions over the ranks", affects="nothing")
    offload_optimizer: OptimizerOffload = setting(
        "none",
        "`cpu`: masters, moments and averages in the CPU's memory, AdamW on the CPU; `nvme`: moments and averages in "
        "files of `offload_dir` instead; with ZeRO 1 to 3",
        affects="nothing",
    )
    offload_dir: str | None = setting(
        None, "folder for `offload_optimizer: nvme`, on a local disk of every host", affects="nothing"
    )
    offload_parameters: Offload = setting(
        "none", "`cpu`: partitioned weights in the CPU's memory; with ZeRO 3", affects="nothing"
    )
    deepspeed: Mapping[str, Any] = setting(
        factory=dict,
        help="further DeepSpeed settings of speed and memory, nested as in its file",
        affects="nothing",
    )
    num_ranks: int = setting(1, "processes that train together", affects="nothing")
    min_ranks: int | None = setting(
        None, "fewest to go on with when nodes are lost for good; null: wait for others", affects="nothing"
    )
    shrink_after_minutes: float = setting(10.0, "how long others are waited for, with `min_ranks`", affects="nothing")
    cpus_per_rank: float = setting(1.0, "CPU cores of each", affects="nothing")
    gpus_per_rank: float = setting(0.0, "GPUs of each: 0 or 1", affects="nothing")
    resources_per_rank: Mapping[str, float] = setting(
        factory=dict, help="further Ray resources of each, such as `{fast_disk: 1}`", affects="nothing"
    )
    placement: Placement = setting(
        "pack",
        "`pack`: ranks on as few nodes as possible, `strict_pack`: on one; `spread`, `strict_spread`: one a node",
        affects="nothing",
    )
    node_labels: Mapping[str, str] = setting(
        factory=dict, help="labels of the Ray nodes to train on, such as `{pool: training}`", affects="nothing"
    )
    accelerator_type: str | None = setting(
        None, "GPU to train on, as Ray calls it, such as `H100`; null: any", affects="nothing"
    )
    micro_batch_size: int | None = setting(None, "samples per forward pass and rank; null: all", affects="nothing")
    checkpoint_every_steps: int = setting(1000, "steps between checkpoints", affects="nothing")
    checkpoint_every_minutes: float | None = setting(None, "minutes between checkpoints, also", affects="nothing")
    checkpoint_in_background: bool = setting(True, "train on while a copy of the state is written", affects="nothing")
    keep_last: int = setting(2, "checkpoints kept", affects="nothing")
    keep_every_steps: int | None = setting(None, "checkpoints of its multiples are kept for good", affects="nothing")
    max_failed_saves: int = setting(3, "checkpoints in a row that may fail to be written", affects="nothing")
    max_nonfinite_steps: int = setting(
        10, "steps in a row, not finite or spikes, after which the training rolls back", affects="nothing"
    )
    max_rollbacks: int = setting(3, "returns to an earlier checkpoint before the training stops", affects="nothing")
    rollback_learning_rate_factor: float = setting(
        0.5, "what a rollback multiplies the learning rate with", affects="nothing"
    )
    hang_timeout_s: float = setting(
        1800.0,
        "seconds without any progress after which a rank reports where it stands and ends; 0: never",
        affects="nothing",
    )
    straggler_ratio: float = setting(
        1.5, "warn of a rank that takes so many times as long as the median of the others", affects="nothing"
    )
    deterministic: bool = setting(False, "deterministic algorithms only; slower", affects="nothing")
    validation: ValidationConfig = setting(
        factory=ValidationConfig, help="loss on held-out samples, with fixed noise; early stop"
    )
    samples: SamplesConfig = setting(
        factory=SamplesConfig, help="samples drawn while training, of held-out ones", affects="nothing"
    )
    wandb: WandbConfig = setting(factory=WandbConfig, help="metrics in Weights & Biases", affects="nothing")
    peak_tflops: float | None = setting(
        None, "dense peak of one GPU in this precision, TFLOP/s, for `mfu`; null: by its name", affects="nothing"
    )
    log_every_steps: int = setting(10, "steps averaged into one line of metrics", affects="nothing")
    tensorboard: bool = setting(True, "write TensorBoard events beside the JSON lines", affects="nothing")
    num_decode_threads: int = setting(0, "threads that decode images; 0: the prefetching one", affects="nothing")
    prefetch_batches: int = setting(4, "batches made ahead of the training", affects="nothing")
    cache_gib: float = setting(1.0, "open shards and decoded images kept per rank, GiB", affects="nothing")
    shard_cache_dir: str | None = setting(None, "local folder that keeps files of a remote store", affects="nothing")
    shard_cache_gib: float = setting(100.0, "what that folder may take, GiB, per host", affects="nothing")
    max_bad_fraction: float = setting(0.01, "samples that may be impossible to decode", affects="nothing")

    def __post_init__(self) -> None:
        self._check_positive()
        self._check_engine()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay} is not in [0, 1); write for example 0.9999")
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is not between 0 and num_steps: {self.num_steps}")
        for name in ("decay_fraction", "final_learning_rate_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name):g} is not in [0, 1]")
        if self.samples.every_steps and not self.validation.num_samples:
            raise ValueError("samples.every_steps: samples are drawn of held-out ones; set validation.num_samples")
        if self.global_batch_size % self.num_streams:
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} is not a multiple of num_streams: {self.num_streams}"
            )
        if self.min_ranks is not None and not 1 <= self.min_ranks <= self.num_ranks:
            raise ValueError(f"min_ranks: {self.min_ranks} is not between 1 and num_ranks: {self.num_ranks}")
        if self.num_streams % self.num_ranks:
            raise ValueError(f"num_ranks: {self.num_ranks} does not divide num_streams: {self.num_streams}")
        num_local = self.global_batch_size // self.num_ranks
        if self.micro_batch_size is not None and num_local % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} does not divide the {num_local} samples of a rank's batch"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: {self.max_bad_fraction} is not between 0 and 1")
        if self.gpus_per_rank not in (0, 1):
            raise ValueError(f"gpus_per_rank: {self.gpus_per_rank:g}; a rank trains on the CPU (0) or on one GPU (1)")

    def _check_engine(self) -> None:
        check_overrides(self.deepspeed)
        if self.engine == "torch" and self.deepspeed:
            raise ValueError("deepspeed: engine: torch does not read it; leave it out, or write engine: deepspeed")
        for name, value, lowest in (
            ("offload_optimizer", self.offload_optimizer, 1),
            ("offload_parameters", self.offload_parameters, 3),
        ):
            if value != "none" and (self.engine == "torch" or self.zero_stage < lowest):
                needed = f"engine: deepspeed and zero_stage: {lowest}" + (" or above" if lowest < 3 else "")
                raise ValueError(f"{name}: {value} needs {needed} (now {self.engine}, {self.zero_stage})")
        if (self.offload_optimizer == "nvme") != (self.offload_dir is not None):
            raise ValueError(
                f"offload_dir: {self.offload_dir} with offload_optimizer: {self.offload_optimizer}; nvme needs a "
                "folder on a local disk, and nothing else reads it"
            )
        for name, amount in self.resources_per_rank.items():
            if name in ("CPU", "GPU", "memory"):
                instead = {"CPU": "cpus_per_rank", "GPU": "gpus_per_rank"}.get(name, "a label or resource of your own")
                raise ValueError(f"resources_per_rank.{name}: {amount:g}; write {instead} instead")
            if amount <= 0:
                raise ValueError(f"resources_per_rank.{name}: {amount:g} is not positive")
        if self.accelerator_type is not None and not self.gpus_per_rank:
            raise ValueError(f"accelerator_type: {self.accelerator_type} needs gpus_per_rank: 1 (now 0)")

    def _check_positive(self) -> None:
        for name in (
            *("num_steps", "global_batch_size", "num_streams", "num_ranks", "keep_last", "prefetch_batches"),
            *("checkpoint_every_steps", "log_every_steps", "max_nonfinite_steps", "learning_rate", "eps"),
            *("max_failed_saves", "checkpoint_every_minutes", "keep_every_steps", "shard_cache_gib"),
            *("gradient_clipping", "cpus_per_rank", "spike_threshold", "spike_window"),
            *("rollback_learning_rate_factor", "shrink_after_minutes"),
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: {value} is not positive")
        if self.hang_timeout_s < 0:
            raise ValueError(f"hang_timeout_s: {self.hang_timeout_s} is negative; write 0 to watch nothing")
        if self.straggler_ratio <= 1:
            raise ValueError(f"straggler_ratio: {self.straggler_ratio} is not above 1; write for example 1.5")
        if self.max_rollbacks < 0:
            raise ValueError(f"max_rollbacks: {self.max_rollbacks} is negative; write 0 for none")


def gang_resources(config: TrainingConfig) -> Resources:
    """Say what a training's ranks need, how many there are, and where they may run."""
    return Resources(
        num_cpus=config.cpus_per_rank,
        num_gpus=config.gpus_per_rank,
        max_workers=1,
        num_ranks=config.num_ranks,
        custom=config.resources_per_rank,
        placement=config.placement,
        node_labels=config.node_labels,
        accelerator_type=config.accelerator_type,
    )


def learning_rate_at(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_from = config.warmup_steps
    if config.learning_rate_schedule == "wsd":
        decay_from = max(decay_from, config.num_steps - round(config.decay_fraction * config.num_steps))
    progress = max(0, step - decay_from) / max(1, config.num_steps - decay_from)
    if config.learning_rate_schedule == "constant":
        height = 1.0
    elif config.learning_rate_schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        height = 1 - progress
    lowest = config.final_learning_rate_fraction
    return config.learning_rate * (lowest + (1 - lowest) * height)


def engine_settings(config: TrainingConfig, world_size: int) -> EngineSettings:
    """Derive what the engine has to know.

    Raises:
        ConfigError: if the batch cannot be dealt evenly to the ranks.
    """
    num_local, rest = divmod(config.global_batch_size, world_size)
    micro_batch_size = config.micro_batch_size or num_local
    if rest or num_local % micro_batch_size:
        raise ConfigError(
            f"global_batch_size: {config.global_batch_size} cannot be dealt to {world_size} ranks in micro batches of "
            f"{micro_batch_size}; choose numbers that divide"
        )
    return EngineSettings(
        num_micro_batches=num_local // micro_batch_size,
        micro_batch_size=micro_batch_size,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        gradient_clipping=config.gradient_clipping,
        precision=config.precision,
        ema_decay=config.ema_decay,
        zero_stage=config.zero_stage,
        offload_optimizer=config.offload_optimizer,
        offload_dir=config.offload_dir,
        offload_parameters=config.offload_parameters,
        deepspeed=config.deepspeed,
        device="cuda" if config.gpus_per_rank else "cpu",
    )
