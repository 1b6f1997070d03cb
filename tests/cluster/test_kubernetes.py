"""Rendered manifests: held to the published schemas, and to what the config says."""

from __future__ import annotations

import gzip
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private import ray_constants

from cluster.kubernetes import render
from flows.cli import main
from stages.config import load_config
from stages.errors import ConfigError
from stages.graph import build_stages, fingerprints
from stages.machines import GpuPoolConfig, KubernetesConfig, PodConfig, PoolConfig
from stages.units import GIB

TOP = Path(__file__).parents[2]
SCHEMAS = Path(__file__).parent / "crds"
QUICKSTART = TOP / "configs" / "quickstart.yaml"
FULL = KubernetesConfig(
    name="unclip",
    namespace="research",
    image="registry.example/unclip:1",
    secrets=("store-keys", "prefect"),
    queue="gpus",
    head=PodConfig(num_cpus=6, memory_gib=24),
    data=PoolConfig(num_cpus=16, memory_gib=64, max_pods=20, spot=True),
    gpu=GpuPoolConfig(num_cpus=32, memory_gib=512, num_gpus=8, max_pods=4, node_labels={"gpu": "h100"}),
)


def closed(schema: Any) -> Any:
    """Turn a structural schema of Kubernetes into one that also refuses keys it does not know."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: closed(value) for key, value in schema.items() if key != "type"}
    if schema.get("x-kubernetes-int-or-string"):
        new["type"] = ["integer", "string"]
    elif isinstance(schema.get("type"), str):
        new["type"] = [schema["type"], "null"] if schema.get("nullable") else schema["type"]
    elif "type" in schema:  # a property of that name
        new["type"] = closed(schema["type"])
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        new["additionalProperties"] = False
    return new


def validator(kind: str) -> tuple[str, Any]:
    stored = json.loads(gzip.decompress((SCHEMAS / f"{kind}.json.gz").read_bytes()))
    schema = closed(stored["schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return stored["apiVersion"], jsonschema.Draft202012Validator(schema)


def objects(config: KubernetesConfig = FULL, root: str = "s3://bucket/store") -> list[dict[str, Any]]:
    return list(itertools.chain(*render(config, root=root, settings="root: x\n").values()))


def pods(found: Any) -> Iterator[dict[str, Any]]:
    """Yield every pod template below a value."""
    if isinstance(found, dict):
        if "template" in found:
            yield found["template"]
        for value in found.values():
            yield from pods(value)
    elif isinstance(found, list):
        for value in found:
            yield from pods(value)


PLAIN = KubernetesConfig(gpu=GpuPoolConfig(num_gpus=1, spot=True))


@pytest.mark.parametrize("config", [FULL, PLAIN, replace(FULL, store_claim="claim")], ids=["full", "plain", "claim"])
def test_every_object_fits_its_published_schema(config: KubernetesConfig) -> None:
    made = objects(config, "/store" if config.store_claim else "s3://bucket/store")
    custom = [item for item in made if item["apiVersion"] != "v1"]
    kinds = {item["kind"] for item in custom}
    assert kinds == {path.name.partition(".")[0] for path in SCHEMAS.glob("*.gz")} or config.queue is None
    for item in custom:
        version, schema = validator(item["kind"])
        assert item["apiVersion"] == version
        schema.validate(item)


def test_the_schemas_refuse_what_is_wrong() -> None:
    cluster = next(item for item in objects() if item["kind"] == "RayCluster")
    _, schema = validator("RayCluster")
    misspelt = {**cluster, "spec": {**cluster["spec"], "rayVersoin": "2"}}
    number = {**cluster, "spec": {**cluster["spec"], "rayVersion": 2}}
    for wrong in (misspelt, number):
        assert not schema.is_valid(wrong)


def test_secrets_are_named_and_never_told() -> None:
    for pod in pods(objects()):
        sources = pod["spec"]["containers"][0]["envFrom"]
        assert sources == [{"secretRef": {"name": name}} for name in FULL.secrets]
        assert {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"} >= {
            variable["name"] for variable in pod["spec"]["containers"][0].get("env", [])
        }


def test_spot_pods_drain_before_they_end() -> None:
    job = next(item for item in objects() if item["kind"] == "RayJob")
    groups = {
        group["groupName"]: group["template"]["spec"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    spot, steady = groups["data"], groups["gpu"]
    [container] = spot["containers"]
    [variable] = container["env"]
    # Ray reads this when it starts, and drains for so long after a SIGTERM.
    assert variable["name"] in inspect.getsource(ray_constants)
    assert 0 < int(variable["value"]) < spot["terminationGracePeriodSeconds"] == FULL.data.drain_s
    command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    [pattern] = set(re.findall(r"-f '([^']+)'", command))
    assert re.search(pattern, "python /opt/unclip/.venv/bin/ray start --address=head:6379 --block")
    assert not re.search(pattern, command)  # the hook neither ends nor waits for itself
    assert spot["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert {"key": "karpenter.sh/capacity-type", "operator": "Equal", "value": "spot", "effect": "NoSchedule"} in spot[
        "tolerations"
    ]
    assert "lifecycle" not in steady["containers"][0] and steady["nodeSelector"] == {"gpu": "h100"}


def amount(text: str) -> int:
    return int(text.removesuffix("Gi"))


def test_rays_object_store_fits_the_shared_memory() -> None:
    """Of more than that Ray would make files on the pod's disk."""
    config = replace(FULL, data=replace(FULL.data, shared_memory_gib=10))
    (cluster,) = [found["spec"] for found in objects(config) if found["kind"] == "RayCluster"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    wanted = [int(group["rayStartParams"]["object-store-memory"]) / GIB for group in groups]
    assert wanted == pytest.approx([0.9 * 4, 0.9 * 10, 0.9 * 16])


def test_the_quota_is_what_the_pods_ask_for() -> None:
    made = objects()
    [queue] = [item for item in made if item["kind"] == "ClusterQueue"]
    spec = next(item for item in made if item["kind"] == "RayCluster")["spec"]
    asked: dict[str, int] = {}
    for group in ({**spec["headGroupSpec"], "maxReplicas": 1}, *spec["workerGroupSpecs"]):
        for name, text in group["template"]["spec"]["containers"][0]["resources"]["requests"].items():
            asked[name] = asked.get(name, 0) + amount(text) * group["maxReplicas"]
    [resources] = queue["spec"]["resourceGroups"]
    quota: dict[str, int] = {}
    for flavor in resources["flavors"]:
        assert [resource["name"] for resource in flavor["resources"]] == resources["coveredResources"]
        for resource in flavor["resources"]:
            quota[resource["name"]] = quota.get(resource["name"], 0) + amount(resource["nominalQuota"])
    assert quota == asked
    flavors = {item["metadata"]["name"] for item in made if item["kind"] == "ResourceFlavor"}
    assert flavors == {flavor["name"] for flavor in resources["flavors"]}


def test_with_a_queue_the_size_stays_and_without_one_ray_scales() -> None:
    for config, scales in ((FULL, False), (replace(FULL, queue=None), True)):
        job = next(item for item in objects(config) if item["kind"] == "RayJob")
        assert ("kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]) is not scales
        spec = job["spec"]["rayClusterSpec"]
        assert spec.get("enableInTreeAutoscaling", False) is scales
        assert all((group["minReplicas"] < group["maxReplicas"]) is scales for group in spec["workerGroupSpecs"])


def test_a_store_that_pods_cannot_reach_is_refused() -> None:
    with pytest.raises(ConfigError, match="which pods do not see"):
        objects(root="runs/quickstart")
    with pytest.raises(ConfigError, match="write null"):
        objects(replace(FULL, store_claim="claim"))
    mounts = [mount for pod in pods(objects(replace(FULL, store_claim="claim"), "/store")) for mount in
              pod["spec"]["containers"][0]["volumeMounts"] if mount["name"] == "store"]  # fmt: skip
    assert len(mounts) == 6 and {mount["mountPath"] for mount in mounts} == {"/store"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "Un_clip"}, "no name for Kubernetes"),
        ({"secrets": ("AKIA/SECRET+VALUE",)}, "names here, and the values"),
        ({"name": "2026-run"}, "a letter first"),
        ({"spot_label": "spot"}, "label=value"),
        ({"spot_label": "="}, "label=value"),
        ({"max_retries": -1}, "max_retries: -1 is negative"),
        ({"data": PoolConfig(num_gpus=1)}, "the pool without GPUs"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        replace(FULL, **values)


def test_what_the_pods_run_is_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["-s", "root=s3://bucket/store", "-s", "kubernetes.queue=gpus", "-s", "cluster.num_cpus=2"]
    given += ["-s", "cluster.submit=http://elsewhere:8265"]
    assert main(["render", "kubernetes", str(QUICKSTART), *given, "-o", str(tmp_path)]) == 0
    named = re.findall(rf"-f {re.escape(str(tmp_path))}/(\S+)", capsys.readouterr().out)
    assert named == ["config.yaml", "queue.yaml", "rayjob.yaml"]
    assert {path.name for path in tmp_path.iterdir()} == {*named, "raycluster.yaml"}
    [config_map] = yaml.safe_load_all((tmp_path / "config.yaml").read_text())
    mounted = tmp_path / "mounted.yaml"
    mounted.write_text(config_map["data"]["config.yaml"])
    inside, here = load_config(mounted), load_config(QUICKSTART, given[1::2])
    assert (inside.cluster.submit, inside.cluster.executor, inside.cluster.address) == (None, "ray", "auto")
    assert fingerprints(build_stages(inside)) == fingerprints(build_stages(here))
    [job] = yaml.safe_load_all((tmp_path / "rayjob.yaml").read_text())
    container = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    folder = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config")
    assert job["spec"]["entrypoint"] == f"unclip run {folder}/config.yaml"
    queue_kinds = [item["kind"] for item in yaml.safe_load_all((tmp_path / "queue.yaml").read_text())]
    assert queue_kinds == ["ResourceFlavor"] * 3 + ["ClusterQueue", "LocalQueue"]


def test_lists_of_this_machine_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["-s", "root=s3://bucket/store", "-s", "source={kind: urls, lists: [urls.csv]}"]
    assert main(["render", "kubernetes", str(QUICKSTART), *given, "-o", str(tmp_path)]) == 2
    assert "source.lists: 'urls.csv' is on this machine" in capsys.readouterr().err
    claimed = ["-s", "root=/mnt/store", "-s", "kubernetes.store_claim=store"]
    for place, code in (("/home/me/urls.csv", 2), ("/mnt/storehouse/urls.csv", 2), ("/mnt/store/urls.csv", 0)):
        assert list(tmp_path.iterdir()) == []
        lists = ["-s", f"source={{kind: urls, lists: [{place}]}}"]
        assert main(["render", "kubernetes", str(QUICKSTART), *claimed, *lists, "-o", str(tmp_path)]) == code
