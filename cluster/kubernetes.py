"""Manifests for Kubernetes, made from the config: a KubeRay cluster, a job that runs the pipeline on it, a Kueue queue.

Plain values in, plain values out: nothing here talks to a cluster, and ``kubectl apply -f`` does the rest. Secrets
appear by name only. Tests hold every manifest to the published CRD schemas.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from stages.errors import ConfigError
from stages.machines import KubernetesConfig, PodConfig, PoolConfig
from stages.storage import is_local
from stages.units import GIB

CONFIG_FOLDER = "/etc/unclip"
CONFIG_NAME = "config.yaml"
_USER_ID = 1000  # of cluster/Containerfile
_GPU = "nvidia.com/gpu"
_ENDING_S = 20  # what Ray and the container need to end, after a drain
# A node that gets SIGTERM drains itself for so long: no new work is given to it, trainings leave it with a checkpoint.
_DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
# A shell that is the container's first process would keep the signal to itself. The brackets: not to find this shell.
_PRE_STOP = "pkill -TERM -f '[r]ay start'; while pgrep -f '[r]ay start' >/dev/null; do sleep 1; done"
_GRACE_S = 30
_OF_SHARED_MEMORY = 0.9  # for Ray's object store; the rest is for torch's and NCCL's


def render(config: KubernetesConfig, *, root: str, settings: str) -> dict[str, list[dict[str, Any]]]:
    """Make all manifests.

    Args:
        config: the section ``kubernetes``.
        root: the store; every pod must reach it.
        settings: the resolved config as YAML, for the pods.

    Returns:
        File name -> Kubernetes objects, in the order in which they are to be applied.

    Raises:
        ConfigError: if the pods could not reach the store.
    """
    _refuse_unreachable(config, root)
    files = {"config": [_config_map(config, settings)]}
    if config.queue is not None:
        files["queue"] = _queue(config)
    files["raycluster"] = [_object(config, "ray.io/v1", "RayCluster", _cluster_spec(config, root), queued=True)]
    files["rayjob"] = [_object(config, "ray.io/v1", "RayJob", _job_spec(config, root), queued=True)]
    return {f"{name}.yaml": objects for name, objects in files.items()}


def _refuse_unreachable(config: KubernetesConfig, root: str) -> None:
    if not is_local(root):
        if config.store_claim is not None:
            raise ConfigError(f"kubernetes.store_claim: '{config.store_claim}', but root is {root}; write null")
    elif config.store_claim is None or not root.startswith("/") or not root.strip("/"):
        raise ConfigError(
            f"root: '{root}' is a folder of this machine, which pods do not see; write s3://bucket/prefix, or an "
            "absolute path with kubernetes.store_claim, a claim that many pods may write"
        )


def _object(
    config: KubernetesConfig, version: str, kind: str, spec: Mapping[str, Any], *, queued: bool = False
) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": config.name}
    if queued and config.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = config.queue
    metadata = {"name": config.name, "namespace": config.namespace, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": dict(spec)}


def _config_map(config: KubernetesConfig, settings: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{config.name}-config", "namespace": config.namespace},
        "data": {CONFIG_NAME: settings},
    }


# ---- Ray ----------------------------------------------------------------------------------------------------------


def _job_spec(config: KubernetesConfig, root: str) -> dict[str, Any]:
    return {
        "entrypoint": f"unclip run {CONFIG_FOLDER}/{CONFIG_NAME}",
        # No pod of its own to submit it: the queue's quota is the cluster and nothing else.
        "submissionMode": "HTTPMode",
        # The store holds all that counts: a job that starts anew goes on where the last one stopped.
        "backoffLimit": config.max_retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": config.keep_finished_s,
        "rayClusterSpec": _cluster_spec(config, root),
    }


def _cluster_spec(config: KubernetesConfig, root: str) -> dict[str, Any]:
    queued = config.queue is not None
    spec: dict[str, Any] = {"rayVersion": importlib.metadata.version("ray")}
    if not queued:  # Kueue admits a cluster as a whole, of a size that stays
        spec |= {
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"upscalingMode": "Default", "idleTimeoutSeconds": 120},
        }
    return {
        **spec,
        "headGroupSpec": {
            # The head runs Ray's bookkeeping and the flow; shards go to the pools.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0", **_object_store(config.head)},
            "template": _pod(config, config.head, root),
        },
        "workerGroupSpecs": [
            {
                "groupName": name,
                "replicas": pool.max_pods if queued else pool.min_pods,
                "minReplicas": pool.max_pods if queued else pool.min_pods,
                "maxReplicas": pool.max_pods,
                "rayStartParams": _object_store(pool),
                "template": _pod(config, pool, root),
            }
            for name, pool in _pools(config).items()
        ],
    }


def _object_store(pod: PodConfig) -> dict[str, str]:
    """Let Ray's object store be in the shared memory that the pod has: by itself Ray takes a share of all memory, and
    goes to the disk if that is more than is shared."""
    return {"object-store-memory": str(int(_OF_SHARED_MEMORY * pod.shared_memory_gib * GIB))}


def _pools(config: KubernetesConfig) -> dict[str, PoolConfig]:
    return {"data": config.data, "gpu": config.gpu}


def _pod(config: KubernetesConfig, pod: PodConfig, root: str) -> dict[str, Any]:
    spot = pod if isinstance(pod, PoolConfig) and pod.spot else None
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{config.name}-config"}},
        {"name": "scratch", "emptyDir": {"sizeLimit": f"{pod.scratch_gib}Gi"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{pod.shared_memory_gib}Gi"}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    if config.store_claim is not None:
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": config.store_claim}})
        mounts.append({"name": "store", "mountPath": root})
    container: dict[str, Any] = {
        "name": "ray",
        "image": config.image,
        "resources": _resources(pod),
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if config.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in config.secrets]
    if spot is not None:
        container["env"] = [{"name": _DRAIN_VARIABLE, "value": str(spot.drain_s - _ENDING_S)}]
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", _PRE_STOP]}}}
    spec: dict[str, Any] = {
        "serviceAccountName": config.service_account,
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER_ID, "fsGroup": _USER_ID},
        "terminationGracePeriodSeconds": spot.drain_s if spot is not None else _GRACE_S,
        "containers": [container],
        "volumes": volumes,
    }
    if labels := _node_labels(config, pod):
        spec["nodeSelector"] = labels
    if tolerations := _tolerations(config, pod):
        spec["tolerations"] = tolerations
    return {"metadata": {"labels": {"app.kubernetes.io/name": config.name}}, "spec": spec}


def _resources(pod: PodConfig) -> dict[str, Any]:
    amounts: dict[str, Any] = {
        "cpu": str(pod.num_cpus),
        "memory": f"{pod.memory_gib}Gi",
        "ephemeral-storage": f"{pod.scratch_gib}Gi",
    }
    if isinstance(pod, PoolConfig) and pod.num_gpus:
        amounts[_GPU] = str(pod.num_gpus)
    return {"requests": amounts, "limits": amounts}


def _node_labels(config: KubernetesConfig, pod: PodConfig) -> dict[str, str]:
    labels = dict(pod.node_labels)
    if isinstance(pod, PoolConfig) and pod.spot:
        key, value = config.spot_label.split("=")
        labels[key] = value
    return labels


def _tolerations(config: KubernetesConfig, pod: PodConfig) -> list[dict[str, Any]]:
    if not isinstance(pod, PoolConfig):
        return []
    found: list[dict[str, Any]] = []
    if pod.spot:
        key, value = config.spot_label.split("=")
        found.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    if pod.num_gpus:
        found.append({"key": _GPU, "operator": "Exists", "effect": "NoSchedule"})
    return found


# ---- Kueue --------------------------------------------------------------------------------------------------------


def _queue(config: KubernetesConfig) -> list[dict[str, Any]]:
    """Make a flavor per pool, a cluster queue whose quota is exactly the pools, and the namespace's way into it."""
    assert config.queue is not None
    # A pod goes to the first flavor that it fits: the head first, so that it never lands on a spot machine.
    pods: dict[str, PodConfig] = {"head": config.head, **_pools(config)}
    flavors = {f"{config.queue}-{name}": pod for name, pod in pods.items()}
    group = {
        "coveredResources": ["cpu", "memory", "ephemeral-storage", _GPU],
        "flavors": [
            {
                "name": name,
                "resources": [{"name": resource, "nominalQuota": amount} for resource, amount in _quota(pod).items()],
            }
            for name, pod in flavors.items()
        ],
    }
    return [
        *(_flavor(config, name, pod) for name, pod in flavors.items()),
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "ClusterQueue",
            "metadata": {"name": config.queue},
            "spec": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": config.namespace}},
                "resourceGroups": [group],
            },
        },
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "LocalQueue",
            "metadata": {"name": config.queue, "namespace": config.namespace},
            "spec": {"clusterQueue": config.queue},
        },
    ]


def _flavor(config: KubernetesConfig, name: str, pod: PodConfig) -> dict[str, Any]:
    spec = {"nodeLabels": labels} if (labels := _node_labels(config, pod)) else {}
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "ResourceFlavor",
        "metadata": {"name": name},
        "spec": spec,
    }


def _quota(pod: PodConfig) -> dict[str, str]:
    """Return what a pool asks for at its largest."""
    num_pods, num_gpus = (pod.max_pods, pod.num_gpus) if isinstance(pod, PoolConfig) else (1, 0)
    return {
        "cpu": str(pod.num_cpus * num_pods),
        "memory": f"{pod.memory_gib * num_pods}Gi",
        "ephemeral-storage": f"{pod.scratch_gib * num_pods}Gi",
        _GPU: str(num_gpus * num_pods),
    }
