"""The machines of a cluster, on this one: each has a network, processes, a name and scratch folders of its own.

They are namespaces of the kernel, joined by a bridge. Where this process may not make them (``isolated`` is False then)
they are groups of processes that share an address, which is what ``ray.cluster_utils`` offers too.

A machine whose first process is killed loses all its processes in the same instant; one whose cable is pulled before
falls silent: nobody hears that its connections have ended.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import free_port

TOP = Path(__file__).parents[2]
_SCRATCH = "/tmp/ray"  # Ray's, on every machine; the names of its sockets must be short
_NAMESPACES = ("--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# The first process of a machine waits until its network is there.
_BOOT = f'read line; hostname "$0"; mount -t tmpfs tmpfs {_SCRATCH}; exec "$@"'
_START_TIMEOUT_S = 120.0
# A machine that falls silent is given up after about five seconds, a head that is gone as in cluster/Containerfile.
ENVIRONMENT = {
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
_HEAD_NODE_ID = "f" * 51 + "0" * 5
_FILLED_IN = ("setup_commands", "head_setup_commands", "worker_setup_commands", "cluster_synced_files")  # by `ray up`
_AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",  # what KubeRay starts
    "RAY_CLOUD_INSTANCE_ID": _HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_NODE_ID,
}


def _own_address() -> str:
    """Return what Ray calls this machine: it takes a name for loopback as a name for its network card."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@dataclass
class Machine:
    """One of them.

    Attributes:
        name: its host name.
        address: of its network card.
        process: what runs it, seen from here.
        cable: this end of its connection; empty where there is none.
        node_id: what Ray calls it.
    """

    name: str
    address: str
    process: subprocess.Popen[bytes]
    cable: str = ""
    node_id: str = ""

    def processes(self) -> list[psutil.Process]:
        """List its processes, the first one first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def find(self, title: str) -> list[psutil.Process]:
        """List those of its processes whose command begins with ``title``, or that run a program of this name."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if process.name() == title or " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    def power_off(self, *, silently: bool = False) -> None:
        """End it without warning; ``silently``: the cable first."""
        if silently:
            self._pull_cable()
        doomed = self.processes()  # without namespaces nobody else ends them
        self.process.kill()
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()
        self._pull_cable()  # connections that have not ended would keep it

    def _pull_cable(self) -> None:
        if self.cable:
            subprocess.run(["ip", "link", "delete", self.cable], capture_output=True)

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs ``words`` there."""
        if not self.cable:
            return list(words)
        first = self.processes()[0].pid
        return ["nsenter", "--target", str(first), "--mount", "--uts", "--net", "--pid", f"--wd={TOP}", *words]


@dataclass
class Machines:
    """A cluster of them; made by ``machines``. The head has no cores for work.

    Attributes:
        isolated: whether they are more than groups of processes.
        environment: of their processes.
        head: the one with the head of the cluster.
        others: those that work.
    """

    isolated: bool
    environment: dict[str, str]
    _autoscaling: Mapping[str, Any] | None
    _bridge: str
    _subnet: str
    _scratch: Path
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))
    _all: list[Machine] = field(default_factory=list)
    others: list[Machine] = field(default_factory=list)

    def start(self) -> None:
        """Start a head; if there was one, another one that knows nothing."""
        ports = (6379, 8265, 10001) if self.isolated else (free_port(), free_port(), free_port())
        port, dashboard, client = ports
        self.head = self._new(
            *("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=true"),
            *("--dashboard-host=0.0.0.0", f"--dashboard-port={dashboard}"),
            f"--ray-client-server-port={client}",
            *self._autoscaler(port),
        )
        self.gcs = f"{self.head.address}:{port}"
        self.client = f"ray://{self.head.address}:{client}"
        self.dashboard = f"http://{self.head.address}:{dashboard}"
        self._wait_for(self.head)

    def add(self, *, num_cpus: int) -> Machine:
        """Add one with cores."""
        return self.add_all(1, num_cpus=num_cpus)[0]

    def add_all(self, count: int, *, num_cpus: int) -> list[Machine]:
        """Add several at once."""
        new = [self._new(f"--address={self.gcs}", f"--num-cpus={num_cpus}") for _ in range(count)]
        for machine in new:
            self._wait_for(machine)
        self.others += new
        return new

    def lose(self, machine: Machine, *, silently: bool = False) -> None:
        """End one without warning."""
        machine.power_off(silently=silently)
        self.others.remove(machine)

    def give_notice(self, machine: Machine) -> None:
        """Let Ray know that one is about to go, as the handler of a spot notice does."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason: int = vars(autoscaler_pb2)["DRAIN_NODE_REASON_PREEMPTION"]
        deadline_ms = int((time.time() + 60) * 1000)
        accepted, why_not = GcsClient(address=self.gcs).drain_node(machine.node_id, reason, "spot notice", deadline_ms)
        assert accepted, why_not

    def on_head(self, words: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on the head."""
        return subprocess.Popen(self.head.command(words), env=self.environment, cwd=TOP, **options)

    def close(self) -> None:
        """End them all."""
        for machine in self._all:
            machine.power_off()
        if self.isolated:
            subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)

    def _new(self, *options: str) -> Machine:
        number = next(self._numbers)
        name = f"machine{number}"
        address = f"{self._subnet}.{number}" if self.isolated else _own_address()
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={address}"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={80 << 20}", *options]
        if self.isolated:
            command = ["unshare", *_NAMESPACES, "sh", "-c", _BOOT, name, *command]
        else:
            command += [f"--temp-dir={tempfile.mkdtemp(dir=self._scratch)}"]
            # Of agents that want the same port, all but one take no jobs.
            command += [f"--dashboard-agent-listen-port={free_port()}"]
        with (self._scratch / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.environment, cwd=TOP
            )
        machine = Machine(name, address, process)
        self._all.append(machine)
        if self.isolated:
            machine.cable = f"{self._bridge}.{number}"
            self._connect(machine)
        return machine

    def _autoscaler(self, port: int) -> list[str]:
        """Let the head bring nodes, which are further processes on its machine; return the options for that."""
        if self._autoscaling is None:
            return []
        address = f"{self._subnet}.2" if self.isolated else _own_address()
        provider = {
            "type": "external",  # what Ray knows it by needs a file that is not installed
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{address}:{port}",
            "head_node_id": _HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        }
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        config = {
            "cluster_name": "drill",
            "provider": provider,
            "head_node_type": "ray.head.default",
            **{key: [] for key in _FILLED_IN},
            **self._autoscaling,
            "available_node_types": {**self._autoscaling["available_node_types"], "ray.head.default": head},
        }
        path = self._scratch / "autoscaling.json"
        path.write_text(json.dumps(config))
        return [f"--autoscaling-config={path}"]

    def _connect(self, machine: Machine) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not machine.processes():
            assert time.monotonic() < deadline and machine.process.poll() is None, self._said(machine)
            time.sleep(0.02)
        first = str(machine.processes()[0].pid)
        _run(*("ip", "link", "add", machine.cable, "type", "veth", "peer", "name", "eth0", "netns", first))
        _run("ip", "link", "set", machine.cable, "master", self._bridge, "up")
        inside = ("nsenter", "--target", first, "--net", "ip")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "address", "add", f"{machine.address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        assert machine.process.stdin is not None
        machine.process.stdin.write(b"\n")
        machine.process.stdin.close()

    def _wait_for(self, machine: Machine) -> None:
        """Wait until Ray counts it, and note what it calls it."""
        from ray._raylet import GcsClient

        known = {other.node_id for other in self._all}
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not machine.node_id:
            assert time.monotonic() < deadline and machine.process.poll() is None, self._said(machine)
            with contextlib.suppress(Exception):  # the head does not answer yet
                for node_id, node in GcsClient(address=self.gcs).get_all_node_info(timeout=5).items():
                    new = node.node_manager_address == machine.address and node_id.hex() not in known
                    if new and node.state == 0:
                        machine.node_id = node_id.hex()
            time.sleep(0.1)

    def _said(self, machine: Machine) -> str:
        return (self._scratch / f"{machine.name}.log").read_text()[-4000:]


@contextlib.contextmanager
def machines(
    environment: Mapping[str, str] | None = None, autoscaling: Mapping[str, Any] | None = None
) -> Iterator[Machines]:
    """Make a cluster with a head; it is gone at the end.

    Args:
        environment: of all its processes, beside that of this one.
        autoscaling: which nodes Ray's autoscaler may bring, as in a file for its cluster launcher; None: it is off.
    """
    bridge, subnet = f"unclip{os.getpid() % 10000}", f"10.{100 + os.getpid() // 250 % 100}.{os.getpid() % 250}"
    given = os.environ | ENVIRONMENT | (_AUTOSCALER if autoscaling else {}) | (environment or {})
    given["PATH"] = f"{Path(sys.executable).parent}:{given['PATH']}"  # a job is started with `python`
    with tempfile.TemporaryDirectory(prefix="u", ignore_cleanup_errors=True) as scratch:
        cluster = Machines(_may_isolate(bridge, subnet), given, autoscaling, bridge, subnet, Path(scratch))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()


def _may_isolate(bridge: str, subnet: str) -> bool:
    """Make the bridge, if this process may make namespaces."""
    if os.environ.get("UNCLIP_TEST_MACHINES") == "processes" or not all(
        map(shutil.which, ("ip", "unshare", "nsenter"))
    ):
        return False
    Path(_SCRATCH).mkdir(exist_ok=True, parents=True)
    if subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True).returncode:
        return False
    if subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], capture_output=True).returncode:
        return False
    _run("ip", "address", "add", f"{subnet}.1/24", "dev", bridge)
    _run("ip", "link", "set", bridge, "up")
    return True
