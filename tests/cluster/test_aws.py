"""The cluster launcher's file, held to Ray's own schema and checks."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.aws import render
from flows.cli import main
from stages.config import load_config
from stages.errors import ConfigError
from stages.machines import AwsConfig, GpuInstanceConfig, InstanceConfig

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def test_ray_accepts_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = ["-s", "root=s3://b/store", "-s", "aws.gpu.spot=true", "-s", "aws.instance_profile=arn:aws:iam::1:x"]
    given += ["-s", "aws.heed_rebalance=true", "-s", "cluster.submit=http://elsewhere:8265"]
    given += ["-s", "aws.initialization_commands=[docker login registry.example]"]
    assert main(["render", "aws", QUICKSTART, *given, "-o", str(tmp_path)]) == 0
    assert re.search(r"ray up \S+/cluster.yaml && ray exec \S+/cluster.yaml 'unclip run", capsys.readouterr().out)
    written = yaml.safe_load((tmp_path / "cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(written)))
    assert written["initialization_commands"] == ["docker login registry.example"]
    machine = written["available_node_types"]["gpu"]["node_config"]
    assert machine["InstanceMarketOptions"] == {"MarketType": "spot"} and machine["IamInstanceProfile"]
    assert "InstanceMarketOptions" not in written["available_node_types"]["data"]["node_config"]
    # What passes notices on takes the options that it is given, and is there only where a notice can come.
    watch = re.fullmatch(
        r"nohup python -m cluster.spot_notice (\S+) --heed-rebalance </dev/null >\S+ 2>&1 &",
        written["worker_start_ray_commands"][-1],
    )
    assert watch is not None and watch[1] == "--address=$RAY_HEAD_IP:6379"
    steady = render(
        AwsConfig(heed_rebalance=True, instance_profile="arn:aws:iam::1:x"), root="s3://b/x", settings_path="x"
    )["worker_start_ray_commands"]
    assert steady == written["worker_start_ray_commands"][:-1]
    assert [Path(path).is_file() for path in written["file_mounts"].values()] == [True]
    inside = load_config(tmp_path / "config.yaml").cluster
    assert (inside.submit, inside.executor, inside.address) == (None, "ray", "auto")
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**copy.deepcopy(written), "max_workers": "many"}))


def test_the_store_must_be_reachable_and_pools_add_up() -> None:
    pools: Any = {"data": InstanceConfig(max_machines=7), "gpu": GpuInstanceConfig(max_machines=2)}
    config = AwsConfig(instance_profile="arn:aws:iam::1:x", **pools)
    assert render(config, root="s3://b/x", settings_path="x")["max_workers"] == 9
    with pytest.raises(ConfigError, match=r"aws.instance_profile: null, so the machines could not reach s3://b/x"):
        render(AwsConfig(), root="s3://b/x", settings_path="x")
    with pytest.raises(ConfigError, match="need s3://"):
        render(config, root="runs/x", settings_path="x")
    with pytest.raises(ValueError, match="min_machines: 3"):
        replace(config, data=InstanceConfig(min_machines=3, max_machines=2))
