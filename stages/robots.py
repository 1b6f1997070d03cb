"""The rules of a host's ``robots.txt`` (RFC 9309), and what it means when there are none to be had.

The standard library's ``urllib.robotparser`` knows neither ``*`` nor ``$``, takes the first rule that matches instead
of the longest, and raises on numbers of thousands of digits. Here every file can be read, and what reading and matching
may cost is bounded, whatever it says.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from stages.failure_codes import failure_code
from stages.fetch import parse_url

ROBOTS_TXT = "/robots.txt"
MAX_BYTES = 512 << 10  # the RFC asks for at least 500 KiB

# The host itself cannot be reached: its rows end for that reason.
_SPEAKS_FOR_ALL = ("dns", "connect", "tls", "blocked_address", "host_down", "host_busy")

# Characters of rules with `*` times characters of the URL: some 50 ms at the worst. An honest host has far less;
# where the rules cannot be held against a URL at that price, the URL is refused.
_MAX_STEPS = 50_000_000

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ANY_AGENT = "*"
_ESCAPE = re.compile("%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# Behind the question mark they separate nothing: `?u=https://a` and `?u=https%3A%2F%2Fa` are the same (RFC, 2.2.2).
_PLAIN_IN_QUERY = _UNRESERVED | frozenset(":/?@[]")


class RobotsRules:
    """What one host allows.

    Args:
        content: of its ``robots.txt``; empty: everything is allowed. What lies behind ``MAX_BYTES`` is not read.
        user_agent: its part before ``/`` is the name that the rules may address.
    """

    def __init__(self, content: bytes = b"", user_agent: str = "") -> None:
        rules = [_rule(value, allows=allows) for allows, value in _lines_for(_name_of(user_agent), content)]
        # The longest rule that matches wins, and of two of the same length the one that allows.
        self._rules = sorted(rules, key=lambda rule: (rule.num_octets, rule.allows), reverse=True)
        self._num_searched = sum(rule.num_octets for rule in rules if len(rule.pieces) > 1)

    def allow(self, url: str) -> bool:
        """Tell whether a URL of this host may be fetched.

        Raises:
            FetchError: ``invalid_url`` or ``scheme``.
        """
        path = parse_url(url).path
        if path == ROBOTS_TXT:
            return True
        # Literal here, special in a rule: a rule means the character itself by its escape.
        path = _normalised(path.replace("*", "%2A").replace("$", "%24"))
        if self._num_searched * len(path) > _MAX_STEPS:
            return False
        return next((rule.allows for rule in self._rules if rule.matches(path)), True)


@dataclass(frozen=True, slots=True)
class _Rule:
    """One line ``Allow`` or ``Disallow``.

    Attributes:
        allows: which of the two.
        pieces: the normalised pattern, parted where it has ``*``.
        to_the_end: whether the pattern ended with ``$``.
    """

    allows: bool
    pieces: tuple[str, ...]
    to_the_end: bool

    @property
    def num_octets(self) -> int:
        """How specific the rule is."""
        return sum(map(len, self.pieces)) + len(self.pieces) - 1 + self.to_the_end

    def matches(self, path: str) -> bool:
        """Tell whether the pattern matches a path, normalised and with its query.

        Of each piece the first place will do, so that there is nothing to go back to.
        """
        first, *others = self.pieces
        if not path.startswith(first):
            return False
        if not others:
            return not self.to_the_end or len(path) == len(first)
        *middle, last = others
        end = len(first)
        for piece in middle:
            start = path.find(piece, end)
            if start < 0:
                return False
            end = start + len(piece)
        return path.endswith(last, end) if self.to_the_end else path.find(last, end) >= 0


def _lines_for(name: str, content: bytes) -> list[tuple[bool, bytes]]:
    """Read the rules of all groups that address a name; if none does, of all groups for any name.

    Returns:
        whether it allows, and the pattern, once each.
    """
    # Dictionaries for their order. Of other names nothing is kept: names times rules may be a great many.
    lines: dict[str, dict[tuple[bool, bytes], None]] = {name: {}, _ANY_AGENT: {}}
    addressed: set[str] = set()  # by the group that is being read
    is_named = in_head = False
    for line in content[:MAX_BYTES].removeprefix(_BYTE_ORDER_MARK).splitlines():
        key, _, value = line.partition(b"#")[0].partition(b":")
        key, value = key.strip().lower(), value.strip()
        if key == b"user-agent":
            addressed = addressed if in_head else set()
            in_head = True
            addressed |= {_name_of(value.decode(errors="replace"))} & lines.keys()
            is_named |= name in addressed
        elif key in (b"allow", b"disallow"):
            in_head = False
            for one in addressed if value else ():
                lines[one][key == b"allow", value] = None
        # Anything else (Sitemap, Crawl-delay, ...) must not interfere, not even with the head of a group.
    return list(lines[name if is_named else _ANY_AGENT])


def _name_of(user_agent: str) -> str:
    """Return the product token: what stands before the version or a blank."""
    return re.split(r"[/\s]", user_agent.strip(), maxsplit=1)[0].lower()


def _rule(pattern: bytes, *, allows: bool) -> _Rule:
    to_the_end = pattern.endswith(b"$")
    text = urllib.parse.quote(pattern[:-1] if to_the_end else pattern, safe="/%:@!$&'()*+,;=~?")
    pieces = _normalised(text.replace("$", "%24")).split("*")
    # Several `*` in a row are one.
    inner = [piece for piece in pieces[1:-1] if piece]
    return _Rule(allows, (pieces[0], *inner, *pieces[1:][-1:]), to_the_end)


def _normalised(path: str) -> str:
    """Write a path so that equal ones are the same text: no needless escapes, the needed ones in capitals."""
    if "%" not in path:
        return path
    before, mark, query = path.partition("?")
    return _unescaped(before, _UNRESERVED) + mark + _unescaped(query, _PLAIN_IN_QUERY)


def _unescaped(text: str, plain: frozenset[str]) -> str:
    def character(escape: re.Match[str]) -> str:
        found = chr(int(escape[1], 16))
        return found if found in plain else escape[0].upper()

    return _ESCAPE.sub(character, text)


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
