"""Which nodes are about to go: a spot machine that got its notice, or one that an operator drains."""

from __future__ import annotations

import time

_ASK_EVERY_S = 1.0


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
