"""Settings of clusters that are rendered for Kubernetes and AWS: a head, a pool for data, a pool with GPUs.

They say where work runs and change no fingerprint. ``cluster/kubernetes.py`` and ``cluster/aws.py`` read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stages.base import setting

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?")  # RFC 1035: KubeRay makes services of it
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?")  # RFC 1123, short enough for what KubeRay appends


@dataclass(frozen=True, kw_only=True)
class PodConfig:
    """What one pod of a pool asks for; requests and limits are the same, so no pod is evicted for its neighbours."""

    num_cpus: int = setting(4, "CPU cores", affects="nothing")
    memory_gib: int = setting(16, "memory, GiB", affects="nothing")
    shared_memory_gib: int = setting(4, "of the memory: /dev/shm, Ray's object store, GiB", affects="nothing")
    scratch_gib: int = setting(20, "temporary files (/tmp), GiB", affects="nothing")
    node_labels: Mapping[str, str] = setting(factory=dict, help="labels that the machines carry", affects="nothing")

    def __post_init__(self) -> None:
        for name in ("num_cpus", "memory_gib", "shared_memory_gib", "scratch_gib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1")
        if self.shared_memory_gib >= self.memory_gib:
            raise ValueError(
                f"shared_memory_gib: {self.shared_memory_gib} leaves nothing of memory_gib: {self.memory_gib}; lower it"
            )


@dataclass(frozen=True, kw_only=True)
class PoolConfig(PodConfig):
    """A pool of like pods, each on a machine of its own size."""

    num_gpus: int = setting(0, "GPUs of a pod", affects="nothing")
    min_pods: int = setting(0, "pods kept even when idle", affects="nothing")
    max_pods: int = setting(4, "pods at most; with a queue, exactly", affects="nothing")
    spot: bool = setting(False, "machines that may be taken back: cheaper, drained when they go", affects="nothing")
    drain_s: int = setting(100, "seconds a spot machine gives notice; AWS: 120", affects="nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_pods <= self.max_pods or self.max_pods < 1:
            raise ValueError(f"min_pods: {self.min_pods} is not between 0 and max_pods: {self.max_pods} (at least 1)")
        if self.num_gpus < 0:
            raise ValueError(f"num_gpus: {self.num_gpus} is negative")
        if self.drain_s < 30:
            raise ValueError(f"drain_s: {self.drain_s} is below 30; a checkpoint and Ray's own end need that long")


@dataclass(frozen=True, kw_only=True)
class GpuPoolConfig(PoolConfig):
    """A pool of like pods with GPUs."""

    num_cpus: int = setting(8, "CPU cores", affects="nothing")
    memory_gib: int = setting(64, "memory, GiB", affects="nothing")
    shared_memory_gib: int = setting(16, "of the memory: /dev/shm, Ray's object store, GiB", affects="nothing")
    scratch_gib: int = setting(100, "temporary files (/tmp), GiB", affects="nothing")
    num_gpus: int = setting(1, "GPUs of a pod", affects="nothing")
    max_pods: int = setting(1, "pods at most; with a queue, exactly", affects="nothing")


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """KubeRay and Kueue manifests of ``unclip render kubernetes``."""

    name: str = setting("unclip", "of the cluster and the job", affects="nothing")
    namespace: str = setting("default", "where everything is created", affects="nothing")
    image: str = setting("unclip:latest", "built from cluster/Containerfile, with its registry", affects="nothing")
    service_account: str = setting("default", "of all pods", affects="nothing")
    secrets: tuple[str, ...] = setting((), "Secrets whose keys become environment variables", affects="nothing")
    store_claim: str | None = setting(None, "claim mounted at `root`; null: root is s3://", affects="nothing")
    queue: str | None = setting(None, "Kueue queue to be made and used; null: no Kueue", affects="nothing")
    spot_label: str = setting("karpenter.sh/capacity-type=spot", "spot machines' label and taint", affects="nothing")
    head: PodConfig = setting(factory=PodConfig, help="Ray's head: runs the flow, no shards", affects="nothing")
    data: PoolConfig = setting(factory=PoolConfig, help="the pool for stages without GPUs", affects="nothing")
    gpu: GpuPoolConfig = setting(
        factory=GpuPoolConfig, help="the pool for embed, training, generate", affects="nothing"
    )
    max_retries: int = setting(3, "times the whole job is started anew; it resumes", affects="nothing")
    keep_finished_s: int = setting(3600, "seconds the finished job's cluster stays, for its logs", affects="nothing")

    def __post_init__(self) -> None:
        for name in ("name", "namespace", "service_account", "store_claim", "queue"):
            value = getattr(self, name)
            if value is not None and not (_NAME if name == "name" else _LABEL).fullmatch(value):
                raise ValueError(
                    f"{name}: '{value}' is no name for Kubernetes; write a-z, 0-9 and -, a letter first, at most 42"
                )
        for secret in self.secrets:
            if not _LABEL.fullmatch(secret):
                raise ValueError(
                    f"secrets: '{secret}' is no name of a Secret; write names here, and the values with "
                    "`kubectl create secret`"
                )
        for name in ("max_retries", "keep_finished_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        if self.spot_label.count("=") != 1 or not all(self.spot_label.split("=")):
            raise ValueError(f"spot_label: '{self.spot_label}' is not `label=value`")
        if self.data.num_gpus:
            raise ValueError("data.num_gpus: this is the pool without GPUs; set gpu.num_gpus")


@dataclass(frozen=True, kw_only=True)
class InstanceConfig:
    """A kind of EC2 machine."""

    instance_type: str = setting("m7i.2xlarge", "EC2 instance type", affects="nothing")
    disk_gib: int = setting(200, "root disk, GiB", affects="nothing")
    min_machines: int = setting(0, "machines kept even when idle", affects="nothing")
    max_machines: int = setting(4, "machines at most", affects="nothing")
    spot: bool = setting(False, "spot machines", affects="nothing")

    def __post_init__(self) -> None:
        if not 0 <= self.min_machines <= self.max_machines:
            raise ValueError(f"min_machines: {self.min_machines} is not between 0 and {self.max_machines}")


@dataclass(frozen=True, kw_only=True)
class GpuInstanceConfig(InstanceConfig):
    """A kind of EC2 machine with GPUs."""

    instance_type: str = setting("g6.2xlarge", "EC2 instance type", affects="nothing")
    disk_gib: int = setting(500, "root disk, GiB", affects="nothing")
    max_machines: int = setting(1, "machines at most", affects="nothing")


@dataclass(frozen=True, kw_only=True)
class AwsConfig:
    """The cluster launcher's file of ``unclip render aws``."""

    name: str = setting("unclip", "of the cluster", affects="nothing")
    region: str = setting("us-west-2", "AWS region", affects="nothing")
    image: str = setting("unclip:latest", "built from cluster/Containerfile, with its registry", affects="nothing")
    ami: str | None = setting(None, "machine image with docker and NVIDIA's drivers; null: Ray's", affects="nothing")
    ssh_user: str = setting("ubuntu", "user of that machine image", affects="nothing")
    instance_profile: str | None = setting(
        None,
        "ARN of an IAM instance profile of all machines: may use the store and, on the head, start and end machines",
        affects="nothing",
    )
    initialization_commands: tuple[str, ...] = setting(
        (), "shell commands on every machine before its container, such as a registry's login", affects="nothing"
    )
    idle_minutes: int = setting(10, "minutes after which an idle machine is given back", affects="nothing")
    heed_rebalance: bool = setting(
        False,
        "spot machines leave when EC2 recommends it, before a notice and perhaps for nothing",
        affects="nothing",
    )
    head: InstanceConfig = setting(factory=InstanceConfig, help="the head", affects="nothing")
    data: InstanceConfig = setting(factory=InstanceConfig, help="machines for stages without GPUs", affects="nothing")
    gpu: GpuInstanceConfig = setting(factory=GpuInstanceConfig, help="machines with GPUs", affects="nothing")
