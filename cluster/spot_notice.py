"""EC2's notices to spot machines, passed on to Ray: a program that runs beside Ray on every machine of a pool.

Usage: python -m cluster.spot_notice --address HEAD:6379

Ray's cluster launcher does not listen for them. KubeRay's pods need none of this: they get SIGTERM, which Ray knows.

The instance metadata service answers 404 until there is a notice: two minutes before a machine is taken back, and
perhaps earlier a recommendation to leave it. It is asked by version 2 of its protocol only, a token first: version 1 is
switched off on many accounts.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import logging
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.draining import DrainRefusedError, drain_node, this_node

logger = logging.getLogger(__name__)

METADATA_URL = "http://169.254.169.254"
POLL_S = 5.0  # as Amazon recommends
_NOTICE_S = 120.0  # how long before the end a notice comes
_TOKEN_TTL_S = 21600
_ANSWER_TIMEOUT_S = 2.0
_PLACES = {
    "instance-action": "/latest/meta-data/spot/instance-action",
    "rebalance": "/latest/meta-data/events/recommendations/rebalance",
}


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What the metadata service says of this machine's end.

    Attributes:
        kind: ``instance-action``: it is taken back; ``rebalance``: it may be soon, or not.
        text: what the service says.
        left_s: seconds until then, by the clock of this machine, at most those of a notice; None if no time is set.
    """

    kind: str
    text: str
    left_s: float | None


class MetadataError(Exception):
    """The metadata service does not answer, or refuses."""


class InstanceMetadata:
    """A client of the metadata service, version 2.

    Args:
        url: of the service.
    """

    def __init__(self, url: str = METADATA_URL) -> None:
        self._url = url.rstrip("/")
        self._token = ""
        # It is on this machine's own link, whatever proxy the environment names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def notice(self, *, heed_rebalance: bool) -> Notice | None:
        """Ask whether this machine is about to go.

        Args:
            heed_rebalance: whether a recommendation counts as a notice.

        Raises:
            MetadataError: if the service does not answer, or refuses.
        """
        for kind in _PLACES if heed_rebalance else ("instance-action",):
            if (text := self._read(_PLACES[kind])) is not None:
                return Notice(kind=kind, text=text, left_s=_left_s(text) if kind == "instance-action" else None)
        return None

    def _read(self, path: str) -> str | None:
        """Return what stands at a path; None if there is nothing. A token that is no longer taken is renewed once."""
        for is_first in (True, False):
            if not self._token:
                self._token = self._ask("PUT", "/latest/api/token", {"ttl-seconds": str(_TOKEN_TTL_S)})
            try:
                return self._ask("GET", path, {"": self._token})
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                self._token = ""
                if error.code != 401 or not is_first:
                    raise MetadataError(f"{self._url}{path}: {error}") from error
        return None

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self._url + path, method=method)
        for name, value in headers.items():
            request.add_header("X-aws-ec2-metadata-token" + f"-{name}" * bool(name), value)
        try:
            with self._opener.open(request, timeout=_ANSWER_TIMEOUT_S) as reply:
                return str(reply.read().decode(errors="replace")).strip()
        except urllib.error.HTTPError as error:
            if method == "GET":
                raise
            raise MetadataError(f"{self._url}{path}: {error}; is version 2 of the service switched on?") from error
        except (OSError, ValueError) as error:
            raise MetadataError(f"{self._url}{path}: {error}") from error


def _left_s(text: str) -> float:
    """Read when the end is; a notice that cannot be read is one all the same."""
    try:
        at = datetime.datetime.fromisoformat(json.loads(text)["time"])
        return min(max(0.0, (at - datetime.datetime.now(datetime.UTC)).total_seconds()), _NOTICE_S)
    except (ValueError, TypeError, KeyError):
        return _NOTICE_S


def wait_for_notice(
    metadata: InstanceMetadata,
    *,
    heed_rebalance: bool,
    poll_s: float = POLL_S,
    until: Callable[[], bool] = lambda: False,
) -> Notice | None:
    """Ask until there is a notice; a service that is away for a while is asked on, and told of once each time.

    Args:
        metadata: the service.
        heed_rebalance: whether a recommendation counts as a notice.
        poll_s: seconds between questions.
        until: asked each time; ends the wait without a notice.
    """
    is_away = False
    while not until():
        try:
            found = metadata.notice(heed_rebalance=heed_rebalance)
            if found is not None:
                return found
            is_away = False
        except MetadataError as error:
            if not is_away:
                logger.warning("no notice of this machine's end can be seen: %s; asking on", error)
            is_away = True
        time.sleep(poll_s)
    return None


def pass_on(notice: Notice, address: str, node_id: str | None, poll_s: float = POLL_S) -> None:
    """Tell Ray, and again until it has heard: its head may be away at this moment.

    Args:
        notice: of this machine.
        address: ``HOST:PORT`` of the cluster's head.
        node_id: of this machine in the cluster; None: it is looked up.
        poll_s: seconds between tries.
    """
    began_at = time.monotonic()
    while True:
        left_s = None if notice.left_s is None else max(0.0, notice.left_s - (time.monotonic() - began_at))
        try:
            drain_node(address, node_id or this_node(address), f"EC2 {notice.kind}: {notice.text}", left_s)
            return
        except DrainRefusedError as error:
            logger.warning("Ray could not be told of the notice: %s; trying again", error)
        time.sleep(poll_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait for this machine's notice, drain its Ray node, and end."""
    parser = argparse.ArgumentParser(prog="cluster.spot_notice", description=__doc__.partition("\n")[0])
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="the head of the Ray cluster")
    parser.add_argument("--node-id", metavar="HEX", help="Ray's name of this node; looked up if not given")
    parser.add_argument("--heed-rebalance", action="store_true", help="drain when Amazon recommends to leave, too")
    parser.add_argument("--metadata-url", default=METADATA_URL, metavar="URL", help="the instance metadata service")
    parser.add_argument("--poll-s", type=float, default=POLL_S, metavar="S", help="seconds between questions")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with _lock_path(args.node_id).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # Ray was started again on this machine, and this program with it
            logger.info("another one watches this machine already")
            return 0
        logger.info("watching for notices of EC2")
        metadata = InstanceMetadata(args.metadata_url)
        notice = wait_for_notice(metadata, heed_rebalance=args.heed_rebalance, poll_s=args.poll_s)
        assert notice is not None
        logger.warning("this machine has its notice (%s): %s", notice.kind, notice.text)
        pass_on(notice, args.address, args.node_id, args.poll_s)
        logger.info("its Ray node is being drained")
    return 0


def _lock_path(node_id: str | None) -> Path:
    name = f"unclip-spot-notice-{os.getuid()}{f'-{node_id}' if node_id else ''}.lock"
    return Path(tempfile.gettempdir()) / name


if __name__ == "__main__":
    sys.exit(main())
