"""Gang stages on Ray Train: every rank of a group runs the same ``process``, with DeepSpeed as its engine.

Ray Train starts the ranks, joins them (gloo on CPUs, nccl on GPUs) and notices when one dies. Checkpoints, metrics and
progress are ours and go past it: a call of ``ray.train.report`` costs seconds. A group that died is started again and
resumes from its newest checkpoint, as long as it gets further than the time before. A group of which a node is going
away (``cluster/draining.py``) writes a checkpoint within a step or two and is started again on the others. With
``min_ranks`` fewer ranks go on where nodes are lost for good (``cluster/elastic.py``).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import tempfile
import uuid
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from cluster.board import BoardLink
from cluster.draining import DrainWatch
from cluster.elastic import per_rank, with_room
from cluster.room import await_nodes
from stages import storage
from stages.base import Shard, Stage, record_uri
from stages.checkpoints import CheckpointFolder
from stages.engine import EngineFactory, TorchEngine
from stages.errors import ShardError, StorageError, UnclipError
from stages.huge_pages import prefer_huge_pages
from stages.manifest import ShardRecord
from stages.training import TrainingStoppedError

logger = logging.getLogger(__name__)

RESTARTED = "training_restarted"  # marks the log record of a restart, for those who count them
_MAX_STARTS_WITHOUT_PROGRESS = 3
_GROUP_TIMEOUT_S = 1800
# A group waits for its turn as long as others use the cluster.
START_TIMEOUT_S = 30 * 24 * 3600


def train_gang(
    stage: Stage[Any], shard: Shard, output: str, board: Any, key: str, wait_for_nodes_s: float | None = None
) -> ShardRecord:
    """Run one shard of a gang stage on a Ray Train group; blocks, and works in any thread.

    Args:
        stage: copied to every rank.
        shard: the training.
        output: URI of the folder of the stage's shards.
        board: handle of the ``Board`` actor.
        key: under which progress is put up.
        wait_for_nodes_s: how long nodes that could hold it are waited for at the start; one that has begun waits for as
            long as it takes. None: that, too.

    Raises:
        StageError: if there are no such nodes by then.
        UnclipError: what a rank raised; a ``StorageError`` only where the group did not get further three times.
        ShardError: retryable, if ranks died again and again without getting further.
    """
    checkpoints = CheckpointFolder(storage.join(output, shard.id), keep_last=1)
    num_idle_starts, best_step = 0, _newest(checkpoints)
    limit_s = wait_for_nodes_s
    while True:
        await_nodes(stage, limit_s, partial(_is_stopping, board, key))
        limit_s = None
        error = _run_group(with_room(stage, partial(_is_stopping, board, key)), shard, output, board, key)
        if error is None:
            return ShardRecord.from_json(storage.read_json(record_uri(output, shard.id)))
        cause = _cause_of(error)
        if isinstance(cause, TrainingStoppedError) and not _is_stopping(board, key):
            best_step = _newest(checkpoints)
            logger.warning("%s: a node is going away; the training moves on at step %d", stage.name, best_step)
            continue
        if isinstance(cause, UnclipError) and not isinstance(cause, StorageError):
            raise cause
        step = _newest(checkpoints)
        # A damaged checkpoint that was passed over counts no more: the newest one may be of an earlier step.
        num_idle_starts = 0 if step > best_step else num_idle_starts + 1
        best_step = step
        if num_idle_starts >= _MAX_STARTS_WITHOUT_PROGRESS:
            if isinstance(cause, StorageError):
                raise cause
            reason = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
            raise ShardError(
                f"{stage.name}: the training group died {num_idle_starts} times without getting past step {best_step}: "
                f"{reason}",
                retryable=True,
            ) from error
        extra = {"stage": stage.name, "event": RESTARTED}
        why = f"lost the store ({cause})" if isinstance(cause, StorageError) else "died"
        logger.warning(
            "%s: the training group %s; starting it again from step %d", stage.name, why, best_step, extra=extra
        )


def _is_stopping(board: Any, key: str) -> bool:
    import ray

    try:
        return bool(ray.get(board.report.remote(key, None)))
    except ray.exceptions.RayActorError:  # gone with its node: who would stop this work is here, and has not
        return False


def _newest(checkpoints: CheckpointFolder) -> int:
    return max(checkpoints.steps(), default=0)


def _run_group(stage: Stage[Any], shard: Shard, output: str, board: Any, key: str) -> Exception | None:
    """Start a group and wait for its end; return what Ray Train raised."""
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from cluster.group_network import GroupConfig

    resources = stage.resources
    uses_gpu = resources.num_gpus > 0
    # Ray Train's own few files; nothing that a resumed training needs.
    with tempfile.TemporaryDirectory(prefix="unclip-ray-train-", ignore_cleanup_errors=True) as scratch:
        trainer = TorchTrainer(
            run_rank,
            train_loop_config={
                "stage": stage,
                "shard": shard,
                "output": output,
                "board": board,
                "key": key,
                "folder": Path.cwd(),
            },
            scaling_config=ScalingConfig(
                num_workers=max(1, resources.num_ranks),
                use_gpu=uses_gpu,
                resources_per_worker=per_rank(dataclasses.replace(resources, accelerator_type=None)),
                placement_strategy=resources.placement.upper(),
                label_selector=dict(resources.node_labels) or None,
                accelerator_type=resources.accelerator_type,
            ),
            torch_config=GroupConfig(backend="nccl" if uses_gpu else "gloo", timeout_s=_group_timeout_s(stage)),
            run_config=RunConfig(
                name=f"{stage.name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                # A restart is decided above, where errors of the user's making are told from dead processes.
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return error
    return None


def _group_timeout_s(stage: Stage[Any]) -> int:
    """Return how long a collective may take: longer than the watchdog's patience, who says more than torch would."""
    return int(max(_GROUP_TIMEOUT_S, 4 * stage.config.hang_timeout_s))


def run_rank(config: dict[str, Any]) -> None:
    """Do one rank's part; called by Ray Train on every worker of the group."""
    prefer_huge_pages()
    import torch
    import torch.distributed as dist

    # DeepSpeed calls collectives that newer versions of torch have renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Ray Train moves its workers to a folder of its own; relative paths in the config start from the user's.
    if config["folder"].is_dir():
        os.chdir(config["folder"])
    stage: Stage[Any] = config["stage"]
    torch.set_num_threads(max(1, math.floor(stage.resources.num_cpus)))
    if stage.resources.num_gpus > 0:
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    link = BoardLink(config["board"], config["key"])
    stage.report = link.report
    process: Any = stage.process
    process(
        config["shard"],
        config["output"],
        make_engine=_engine_of(stage),
        should_stop=partial(_must_leave, DrainWatch(), link if dist.get_rank() == 0 else None),
    )


def _must_leave(drains: DrainWatch, link: BoardLink | None) -> bool:
    """Tell whether a rank wants a checkpoint and an end: its node is going away, or the first one was asked to stop."""
    return drains.here() or (link is not None and link.should_stop())


def _engine_of(stage: Stage[Any]) -> EngineFactory:
    if stage.config.engine == "torch":
        return TorchEngine
    from cluster.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine


def _cause_of(error: Exception) -> BaseException:
    """Find what a rank raised: of several, the pipeline's own error, since the others fail only because it did."""
    failures = [getattr(e, "_base_exc", e) for e in getattr(error, "worker_failures", {}).values()]
    own = [failure for failure in failures if isinstance(failure, UnclipError)]
    return next(iter(own or failures), error)
