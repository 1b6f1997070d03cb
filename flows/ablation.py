"""Run an ablation: the stages of all its trials as one Prefect flow, each distinct one once.

Trials share what their settings do not touch (data, CLIP, upsamplers): a stage is identified by its fingerprint, so
the union of all trials is a small graph, whose independent nodes run at the same time. What is done stays done, also
between two runs of the same ablation.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows.interrupt import Cancelled, Interrupt
from flows.lease_wait import held
from flows.logs import CURRENT_STAGE, hide_secrets_from_prefect
from flows.prefect_server import PrivateServer, prefect_api
from flows.progress import format_duration
from stages.ablation import Trial
from stages.base import Stage
from stages.config import load_config
from stages.errors import StageError
from stages.executor import ClusterConfig, Executor
from stages.graph import build_stages, fingerprints
from stages.manifest import Manifest
from stages.redaction import errors_without_secrets
from stages.runner import StageProgress, inspect_stage, run_stage

logger = logging.getLogger(__name__)

_NUM_THREADS = 4  # trainings that wait for room on the cluster already hold a process each


@dataclass(frozen=True, kw_only=True)
class Node:
    """One distinct stage of the ablation.

    Attributes:
        key: stage and fingerprint.
        stage: what is run.
        fingerprint: name of its output.
        upstream: stage name -> key of the node it reads.
        trials: who needs it, for people.
    """

    key: str
    stage: Stage[Any]
    fingerprint: str
    upstream: Mapping[str, str]
    trials: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class AblationRun:
    """Everything alive in one run.

    Attributes:
        nodes: in an order in which every node follows what it reads.
        results: key of every trial's evaluation.
        executor: where shards are processed.
        cluster: retry policy of shards.
        interrupt: knows whether the user has stopped the run.
        manifests: what was made or found, by key.
        errors: what failed.
    """

    nodes: Mapping[str, Node]
    results: Mapping[Trial, str]
    executor: Executor | None = None
    cluster: ClusterConfig
    interrupt: Interrupt = field(default_factory=Interrupt)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def pending(self) -> list[str]:
        """Find out what is done; return the keys of the rest."""
        for node in self.nodes.values():
            if all(key in self.manifests for key in node.upstream.values()):
                inputs = {name: self.manifests[key] for name, key in node.upstream.items()}
                if (manifest := inspect_stage(node.stage, node.fingerprint, inputs).manifest) is not None:
                    self.manifests[node.key] = manifest
        return [key for key in self.nodes if key not in self.manifests]

    def do(self, key: str, inputs: Mapping[str, Manifest]) -> Manifest:
        """Bring one node to its end."""
        node = self.nodes[key]
        assert self.executor is not None
        started_at = time.monotonic()
        ttl_s, progress = self.cluster.lease_ttl_s, self._on_progress
        with held(node.stage, node.fingerprint, ttl_s, progress) as lease:
            # Another run may have finished it while this one waited.
            manifest = inspect_stage(node.stage, node.fingerprint, inputs).manifest or run_stage(
                node.stage, node.fingerprint, inputs, self.executor, self.cluster, on_progress=progress, lease=lease
            )
        logger.info(
            "done in %s (%d of %d), for %s",
            format_duration(time.monotonic() - started_at),
            len(self.manifests) + 1,
            len(self.nodes),
            node.trials[0] if len(node.trials) == 1 else f"{node.trials[0]} and {len(node.trials) - 1} more",
        )
        return manifest

    def _on_progress(self, progress: StageProgress) -> None:
        if self.interrupt.cancelled.is_set():
            raise Cancelled


CURRENT_ABLATION: contextvars.ContextVar[AblationRun] = contextvars.ContextVar("ablation")


def open_ablation(base: Path, trials: Sequence[Trial]) -> AblationRun:
    """Unite the stages of all trials into one graph.

    Args:
        base: the config file they are variants of.
        trials: from ``stages.config.load_ablation``.

    Raises:
        ConfigError: if a trial's config is wrong.
        InputError: if an input outside the store is missing.
    """
    nodes: dict[str, Node] = {}
    results: dict[Trial, str] = {}
    cluster = ClusterConfig()
    for trial in trials:
        config = load_config(base, trial.overrides)
        cluster = config.cluster
        stages = build_stages(config)
        names = fingerprints(stages)
        for name in _needed_by("evaluate", stages):
            key = f"{name}/{names[name]}"
            upstream = {up: f"{up}/{names[up]}" for up in stages[name].upstream}
            node = nodes.setdefault(key, Node(key=key, stage=stages[name], fingerprint=names[name], upstream=upstream))
            node.trials.append(_title(trial))
        results[trial] = f"evaluate/{names['evaluate']}"
    return AblationRun(nodes=nodes, results=results, cluster=cluster)


def _title(trial: Trial) -> str:
    guidance = "" if trial.guidance_scale is None else f", guidance {trial.guidance_scale:g}"
    return f"{trial.variant} (seed {trial.seed}{guidance})"


def _needed_by(last: str, stages: Mapping[str, Stage[Any]]) -> list[str]:
    """Return a stage and all it rests on, in order."""
    needed = {last}
    for name in reversed(list(stages)):
        if name in needed:
            needed |= set(stages[name].upstream)
    return [name for name in stages if name in needed]


def run_ablation(run: AblationRun, *, name: str, server: PrivateServer | None) -> None:
    """Run what is pending as a Prefect flow; errors end up in ``run.errors``.

    Raises:
        KeyboardInterrupt: if the user stopped it.
    """
    with prefect_api(server):
        token = CURRENT_ABLATION.set(run)
        try:
            state = ablation.with_options(task_runner=ThreadPoolTaskRunner(max_workers=_NUM_THREADS))(  # type: ignore[arg-type]
                name, run.pending, return_state=True
            )
        except Cancelled:
            raise KeyboardInterrupt from None
        finally:
            CURRENT_ABLATION.reset(token)
    if run.interrupt.cancelled.is_set():
        raise KeyboardInterrupt
    if state.is_failed() and not run.errors:
        run.errors.append(str(state.result(raise_on_failure=False)))


@flow(name="unclip-ablation", flow_run_name="{name}", persist_result=False)
def ablation(name: str, pending: list[str]) -> None:
    """Bring the nodes of an ablation to their end, each as soon as those it reads are done.

    Raises:
        StageError: if one failed; nodes that do not need it have run to their end by then.
    """
    hide_secrets_from_prefect()
    run = CURRENT_ABLATION.get()
    run.interrupt.listen()
    made: dict[str, PrefectFuture[Any] | str] = {key: manifest.uri for key, manifest in run.manifests.items()}
    for key in pending:
        inputs = {up: made[source] for up, source in run.nodes[key].upstream.items()}
        made[key] = do_node.with_options(name=run.nodes[key].stage.name).submit(key, inputs)  # type: ignore[arg-type]
    wait([future for future in made.values() if isinstance(future, PrefectFuture)])
    if run.errors:
        raise StageError("; ".join(run.errors))


@task(name="node", task_run_name="{key}", cache_policy=NO_CACHE, persist_result=False)
def do_node(key: str, inputs: dict[str, str]) -> str:
    """Bring one node to its end.

    Args:
        key: of the node.
        inputs: upstream stage -> URI of its manifest.

    Returns:
        The URI of the node's manifest.
    """
    run = CURRENT_ABLATION.get()
    node = run.nodes[key]
    token = CURRENT_STAGE.set(node.stage.name)
    try:
        found = {name: Manifest.read_uri(node.stage.root, uri) for name, uri in inputs.items()}
        with errors_without_secrets():  # Prefect keeps the text of what a task raises
            run.manifests[key] = run.do(key, found)
    except Exception as error:
        if not run.interrupt.cancelled.is_set():
            run.errors.append(f"{node.trials[0]}: {error}")
        raise
    finally:
        CURRENT_STAGE.reset(token)
    return run.manifests[key].uri
