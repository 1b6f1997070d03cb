"""The rules of a host's ``robots.txt`` (RFC 9309), and what it means when there are none to be had."""

from __future__ import annotations

import urllib.robotparser

from stages.failure_codes import failure_code

ROBOTS_TXT = "/robots.txt"
MAX_BYTES = 512 << 10  # the RFC asks for at least 500 KiB

# The host itself cannot be reached: its rows end for that reason.
_SPEAKS_FOR_ALL = ("dns", "connect", "tls", "blocked_address", "host_down", "host_busy")


class RobotsRules:
    """What one host allows.

    Args:
        content: of its ``robots.txt``; empty: everything is allowed.
    """

    def __init__(self, content: bytes = b"") -> None:
        self._parser = urllib.robotparser.RobotFileParser()
        self._parser.parse(content.decode("utf-8-sig", errors="replace").splitlines())

    def allow(self, url: str, user_agent: str) -> bool:
        """Tell whether a URL may be fetched.

        Args:
            url: of this host.
            user_agent: its part before ``/`` is the name that the rules may address.
        """
        return self._parser.can_fetch(user_agent, url)


def refusal_without_rules(reason: str) -> str | None:
    """Return the reason with which a host's rows end when its ``robots.txt`` could not be read; None: they may go on.

    Args:
        reason: why it could not be read. That there is none (4xx, an empty file) allows everything; that the server
            fails or keeps silent forbids everything for now.
    """
    if reason in _SPEAKS_FOR_ALL:
        return reason
    is_absent = reason.startswith("http_") and not failure_code(reason).can_pass
    return None if is_absent or reason in ("empty", "redirects") else "robots_txt_unreachable"
