"""Start Ray on this machine, or join a cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.ray_executor import RayExecutor
from stages.errors import ConfigError, StageError, first_line
from stages.executor import ClusterConfig
from stages.units import GIB

logger = logging.getLogger(__name__)

_MAX_STARTS = 3
_ANSWER_TIMEOUT_S = 10.0
_QUIET: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
# Quiet, private, and patient: a training group may wait for its turn. A thread that still asks a closed executor's
# cluster for something must fail: by itself Ray would start another cluster to answer it.
_ENVIRONMENT = {
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Not a fault but how we work: groups that wait their turn have processes too.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node",
}
# An actor per training, seconds of imports, that waits for notices which only clusters of spot machines get.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# What workers and jobs on other machines need to know of this one to find the store. Credentials belong to the machines
# themselves: Ray shows what is passed on to whoever may look at the cluster.
FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION")
_PACKAGES = ("stages", "cluster", "unclip_models")


def connect(cluster: ClusterConfig) -> RayExecutor:
    """Start Ray on this machine, or join a cluster; call it in the main thread, with whose life Ray's processes end.

    Raises:
        ConfigError: if the cluster does not answer.
        StageError: if Ray does not start here.
    """
    from cluster.training import START_TIMEOUT_S

    environment = _ENVIRONMENT | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S)}
    for name, value in (environment | (_LOCAL_ENVIRONMENT if cluster.address == "local" else {})).items():
        os.environ.setdefault(name, value)
    if cluster.address == "local":
        _start(cluster)
    else:
        _join(cluster)
    return RayExecutor(grows=cluster.address != "local", wait_for_nodes_s=cluster.wait_for_nodes_s)


def _start(cluster: ClusterConfig) -> None:
    """Start Ray on this machine; it gives itself 30 s, which a busy machine can miss once."""
    import ray

    for attempt in range(1, _MAX_STARTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cluster.num_cpus,
                num_gpus=cluster.num_gpus,
                object_store_memory=int(cluster.object_store_gib * GIB),
                include_dashboard=False,
                **_QUIET,
            )
            return
        except Exception as error:  # a bare Exception is what Ray raises when it was too slow
            ray.shutdown()
            if attempt == _MAX_STARTS or isinstance(error, ValueError):
                raise StageError(
                    f"cluster: Ray does not start on this machine: {first_line(error)}; free some memory and cores "
                    "and run again, or set cluster.executor: local"
                ) from error
            logger.warning("Ray did not start (%s); trying again", first_line(error))


def _join(cluster: ClusterConfig) -> None:
    import ray

    try:
        _refuse_dead(cluster.address)
        _refuse_outsiders(cluster.address)
        # A driver that is itself a Ray Job has its code and environment from there, and its workers inherit them.
        runtime_env = None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else _runtime_env(cluster)
        ray.init(address=cluster.address, runtime_env=runtime_env, **_QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cluster.address: '{cluster.address}': {first_line(error)}; start that cluster, correct the address, or "
            "write `local`"
        ) from error


def _refuse_dead(address: str) -> None:
    """Make sure that somebody listens at an address: Ray would ask for more than a minute before it says so.

    Raises:
        OSError: if nobody does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():  # `auto` is Ray's to look for
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_TIMEOUT_S).close()


def _refuse_outsiders(address: str) -> None:
    """Make sure that this machine is a node of the cluster at ``HOST:PORT``.

    A driver works through Ray's process on its own machine; where there is none, Ray ends the whole Python.

    Raises:
        ConfigError: if it is none.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is compiled

    host, _, port = address.rpartition(":")
    if "://" in address or not (host and port.isdigit()):
        return
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=_ANSWER_TIMEOUT_S).values()
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"no head of a Ray cluster answers there: {first_line(error)}") from error
    if not any(node.state == 0 and Path(node.raylet_socket_name).exists() for node in nodes):
        raise ConfigError(
            f"cluster.address: '{address}': this machine is not a node of that cluster, so it cannot drive it; hand "
            f"the run over with cluster.submit: http://{host}:8265, or drive from here with cluster.address: "
            f"ray://{host}:10001"
        )


def _runtime_env(cluster: ClusterConfig) -> dict[str, Any]:
    """Describe what a remote worker needs of this machine: the code, and where the store is."""
    top = Path(__file__).parents[1]
    return {
        "py_modules": [str(top / package) for package in _PACKAGES],
        "env_vars": {**passed_on(cluster), "RAY_TRAIN_METRICS_ENABLED": "0"},
    }


def passed_on(cluster: ClusterConfig) -> dict[str, str]:
    """Collect the variables of this environment that other machines get.

    Raises:
        ConfigError: if one that the config names is not set here.
    """
    for name in cluster.pass_env:
        if name not in os.environ:
            raise ConfigError(f"cluster.pass_env: {name} is not set in this environment; set it or leave it out")
    return {name: os.environ[name] for name in (*FORWARDED, *cluster.pass_env) if name in os.environ}
