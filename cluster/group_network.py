"""Which network a training group talks over: the one that the cluster itself uses.

Gloo asks the machine for its own name and listens on what that resolves to. Where that is nothing, or 127.0.1.1 as on a
fresh Debian, it listens on loopback, and ranks on two machines never meet.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_VARIABLE = "GLOO_SOCKET_IFNAME"


@dataclass
class GroupConfig(TorchConfig):
    """Ray Train's own, with every rank on the network of its node."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the group up."""
        return _GroupBackend


class _GroupBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_network_of_the_node)
        super().on_start(worker_group, backend_config)


def use_network_of_the_node() -> None:
    """Let gloo use the network card that the cluster knows this node by; what the user has set stays."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(_VARIABLE, name)


def interface_of(address: str) -> str | None:
    """Return the name of the network card with an IP address; None if there is none, as behind some container nets."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family in (socket.AF_INET, socket.AF_INET6) and a.address == address for a in addresses):
            return str(name)
    return None
