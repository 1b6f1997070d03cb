"""Nodes that are about to go, spot machines after a notice or what an operator drains: who they are, who says so."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

_ASK_EVERY_S = 1.0
_ANSWER_TIMEOUT_S = 10.0


class DrainWatch:
    """Asks the cluster at most once a second."""

    def __init__(self) -> None:
        self._asked_at = float("-inf")
        self._nodes: frozenset[str] = frozenset()

    def nodes(self) -> frozenset[str]:
        """Return the ids of the nodes that are being drained; those of the last answer if the cluster is silent.

        A process that reaches the cluster through Ray's client (``ray://``) is told of none.
        """
        from ray._private import state  # Ray Train's own watcher asks this; there is no public way
        from ray.exceptions import RayError

        if time.monotonic() - self._asked_at >= _ASK_EVERY_S:
            self._asked_at = time.monotonic()
            try:
                self._nodes = frozenset(state.state.get_draining_nodes())
            # Another version of Ray, a head that is away, or a process that is not connected to it.
            except (AttributeError, OSError, RuntimeError, RayError):
                return self._nodes
        return self._nodes

    def here(self) -> bool:
        """Tell whether the node of this process is being drained."""
        import ray

        return ray.get_runtime_context().get_node_id() in self.nodes()


class DrainRefusedError(Exception):
    """The cluster does not answer, does not know the node, or refuses to drain it."""


def this_node(address: str) -> str:
    """Return the id of the Ray node that runs on this machine.

    Args:
        address: ``HOST:PORT`` of the cluster's head.

    Raises:
        DrainRefusedError: if there is none, or more than one.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is compiled
    from ray.exceptions import RayError

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=_ANSWER_TIMEOUT_S)
    except (RayError, OSError) as error:
        raise DrainRefusedError(f"{address} does not answer: {error}") from error
    # The sockets of Ray have the same path on every machine of a cluster.
    own = {card.address for cards in psutil.net_if_addrs().values() for card in cards}
    here = [
        key.hex()
        for key, node in nodes.items()
        if node.state == 0 and node.node_manager_address in own and Path(node.raylet_socket_name).exists()
    ]
    if len(here) != 1:
        raise DrainRefusedError(f"{len(here)} nodes of the cluster at {address} run on this machine, not one")
    return str(here[0])


def drain_node(address: str, node_id: str, why: str, left_s: float | None) -> None:
    """Tell the cluster that a node is about to be taken back: no new work goes there, and trainings leave it.

    Args:
        address: ``HOST:PORT`` of the cluster's head.
        node_id: the node.
        why: for people.
        left_s: seconds until it goes; None: not known.

    Raises:
        DrainRefusedError: if the cluster does not answer, or refuses.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is compiled
    from ray.core.generated import autoscaler_pb2
    from ray.exceptions import RayError

    reason: int = vars(autoscaler_pb2)["DRAIN_NODE_REASON_PREEMPTION"]
    deadline_ms = 0 if left_s is None else int((time.time() + left_s) * 1000)  # 0: there is none
    try:
        is_accepted, why_not = GcsClient(address=address).drain_node(node_id, reason, why, deadline_ms)
    except (RayError, OSError) as error:
        raise DrainRefusedError(f"{address} does not answer: {error}") from error
    if not is_accepted:
        raise DrainRefusedError(f"{address} refuses to drain {node_id}: {why_not}")
