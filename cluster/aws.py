"""The file that Ray's cluster launcher (``ray up``) takes, made from the config; held to Ray's own schema by a test."""

from __future__ import annotations

from typing import Any

from stages.errors import ConfigError
from stages.machines import AwsConfig, InstanceConfig
from stages.storage import is_local

CONFIG_PATH = "~/config.yaml"
WATCH_LOG = "/tmp/spot-notice.log"


def render(config: AwsConfig, *, root: str, settings_path: str) -> dict[str, Any]:
    """Make the launcher's file.

    Args:
        config: the section ``aws``.
        root: the store.
        settings_path: the resolved config, a file of this machine that is copied to the head.

    Raises:
        ConfigError: if the machines could not reach the store.
    """
    if is_local(root):
        raise ConfigError(f"root: '{root}' is a folder of this machine; machines of a cluster need s3://bucket/prefix")
    if config.instance_profile is None:
        raise ConfigError(
            f"aws.instance_profile: null, so the machines could not reach {root}; name an instance profile that may "
            "use the store, start and end EC2 machines, and pass itself on to them"
        )
    return {
        "cluster_name": config.name,
        "max_workers": config.data.max_machines + config.gpu.max_machines,
        "idle_timeout_minutes": config.idle_minutes,
        "provider": {"type": "aws", "region": config.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": config.ssh_user},
        "docker": {
            "image": config.image,
            "container_name": "unclip",
            "pull_before_run": True,
            # Docker is told of GPUs by Ray where there are some; shared memory is for Ray's object store.
            "run_options": ["--ulimit nofile=65536:65536", "--ipc=host"],
        },
        "available_node_types": {
            # The head runs Ray's bookkeeping and the flow; shards go to the others.
            "head": {"resources": {"CPU": 0}, "node_config": _machine(config, config.head)},
            "data": _workers(config, config.data),
            "gpu": _workers(config, config.gpu),
        },
        "head_node_type": "head",
        "file_mounts": {CONFIG_PATH: settings_path},
        "initialization_commands": list(config.initialization_commands),
        # The image holds everything.
        "setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            "ray start --head --port=6379 --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            "ray start --address=$RAY_HEAD_IP:6379",
            *([_watch(config)] if config.data.spot or config.gpu.spot else []),
        ],
    }


def _watch(config: AwsConfig) -> str:
    """Return the command that passes EC2's notices on to Ray; on machines that are no spot machines none ever comes."""
    heed = " --heed-rebalance" if config.heed_rebalance else ""
    watch = f"python -m cluster.spot_notice --address=$RAY_HEAD_IP:6379{heed}"
    # The launcher waits until nothing holds on to the shell's output.
    return f"nohup {watch} </dev/null >{WATCH_LOG} 2>&1 &"


def _workers(config: AwsConfig, instances: InstanceConfig) -> dict[str, Any]:
    """Describe a pool; how many cores and GPUs its machines have, Ray asks AWS."""
    return {
        "min_workers": instances.min_machines,
        "max_workers": instances.max_machines,
        "resources": {},
        "node_config": _machine(config, instances),
    }


def _machine(config: AwsConfig, instances: InstanceConfig) -> dict[str, Any]:
    disk = {"VolumeSize": instances.disk_gib, "VolumeType": "gp3"}
    machine: dict[str, Any] = {
        "InstanceType": instances.instance_type,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # On the head it takes the place of the role that Ray would make, with which the autoscaler works.
        "IamInstanceProfile": {"Arn": config.instance_profile},
    }
    if config.ami is not None:
        machine["ImageId"] = config.ami
    if instances.spot:
        machine["InstanceMarketOptions"] = {"MarketType": "spot"}
    return machine
