"""The rules of ``robots.txt`` against the examples of RFC 9309, and against files that mean harm."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.robots import MAX_BYTES, RobotsRules

HOST = "http://a"


def allowed(content: str | bytes, path: str, user_agent: str = "ExampleBot/1.0") -> bool:
    data = content.encode() if isinstance(content, str) else content
    return RobotsRules(data, user_agent).allow(HOST + path)


def verdicts(rules: str, *paths: str) -> list[bool]:
    """Tell what rules for any agent say of some paths."""
    return [allowed(f"User-agent: *\n{rules}", path) for path in paths]


# ---- groups (RFC 9309, 2.2.1 and 5.1) -------------------------------------------------------------------------------

SIMPLE_EXAMPLE = """\
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""


@pytest.mark.parametrize(
    ("user_agent", "expected"),
    [
        ("foobot", {"/example/page.html", "/example/allowed.gif"}),
        ("barbot", {"/", "/example/", "/example/allowed.gif", "/a.gif", "/publications/b.gif"}),
        ("bazbot/2.0", {"/", "/example/", "/example/allowed.gif", "/a.gif", "/publications/b.gif"}),
        ("QuxBot", {"/", "/example/", "/example/page.html", "/example/allowed.gif", "/a.gif", "/publications/b.gif"}),
        # Of `Disallow: *.gif$` and `Allow: /publications/` the second is longer.
        ("otherbot", {"/", "/publications/b.gif"}),
        ("foo", {"/", "/publications/b.gif"}),
    ],
)
def test_the_simple_example(user_agent: str, expected: set[str]) -> None:
    paths = ["/", "/example/", "/example/page.html", "/example/allowed.gif", "/a.gif", "/publications/b.gif"]
    assert {path for path in paths if allowed(SIMPLE_EXAMPLE, path, user_agent)} == expected


def test_groups_of_the_same_name_are_one() -> None:
    content = """\
user-agent: ExampleBot
disallow: /foo
disallow: /bar

user-agent: *
disallow: /other

user-agent: examplebot/7
disallow: /baz
"""
    paths = ["/foo", "/bar", "/baz", "/other", "/"]
    assert [allowed(content, path) for path in paths] == [False, False, False, True, True]
    assert [allowed(content, path, "bot") for path in paths] == [True, True, True, False, True]


def test_other_lines_do_not_come_between() -> None:
    content = """\
Disallow: /before-any-group
Sitemap: https://a/sitemap.xml
User-agent: ExampleBot # that is us
Crawl-delay: 5

User-agent: otherbot
nonsense
# a note
  DISALLOW : /both   # and why
Sitemap: https://a/other.xml
Disallow: /too
User-agent: another
Disallow: /
"""
    for user_agent in ("ExampleBot", "otherbot"):
        paths = ["/before-any-group", "/both", "/too", "/"]
        assert [allowed(content, path, user_agent) for path in paths] == [True, False, False, True]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_any_end_of_line_and_a_byte_order_mark(end: str) -> None:
    content = b"\xef\xbb\xbf" + end.join(["User-agent: *", "Disallow: /private", ""]).encode()
    assert not allowed(content, "/private/1") and allowed(content, "/public")


# ---- rules (RFC 9309, 2.2.2, 2.2.3 and 5.2) -------------------------------------------------------------------------


def test_the_longest_match_wins() -> None:
    rules = "Allow: /example/page/\nDisallow: /example/page/disallowed.gif"
    assert verdicts(rules, "/example/page/", "/example/page/disallowed.gif") == [True, False]
    assert verdicts("Allow: /\nDisallow: /private", "/private/1", "/public") == [False, True], "in any order"


@pytest.mark.parametrize(
    ("rules", "path", "expected"),
    [
        # Of equivalent rules the one that allows is used.
        ("Disallow: /folder\nAllow: /folder", "/folder/page", True),
        ("Allow: /p\nDisallow: /", "/page", True),
        ("Allow: /page\nDisallow: /*.htm", "/page.htm", False),
        ("Allow: /page\nDisallow: /*.ph", "/page.php5", True),
        ("Allow: /$\nDisallow: /", "/", True),
        ("Allow: /$\nDisallow: /", "/page.htm", False),
    ],
)
def test_which_of_two_rules_is_used(rules: str, path: str, expected: bool) -> None:
    assert verdicts(rules, path) == [expected]


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("/", "/ /fish /?a=b", ""),
        ("/fish", "/fish /fish.html /fishheads/yummy.html /fish.php?id=1", "/Fish.asp /catfish /?id=fish"),
        ("/fish*", "/fish /fish.html /fishheads/yummy.html", "/Fish.asp /catfish"),
        ("/fish/", "/fish/ /fish/?id=1 /fish/salmon.htm", "/fish /fish.html /Fish/Salmon.asp"),
        ("/*.php", "/index.php /folder/file.php?x /folder/any.php.file.html /filename.php/", "/ /windows.PHP"),
        ("/*.png$", "/a.png /b/c.png /.png.png", "/a.png?x /a.png/ /a.jpg /png"),
        ("/*.php$", "/filename.php /folder/filename.php", "/filename.php?x /filename.php/ /filename.php5 /windows.PHP"),
        ("/fish*.php", "/fish.php /fishheads/catfish.php?x", "/Fish.PHP"),
        ("/path/$", "/path/", "/path /path/a"),
        ("*.gif$", "/a.gif /b/c.gif", "/a.gifs"),
        ("/a**b*$", "/ab /a/b/c", "/a /ba"),
        ("/*a*b*c", "/abc /xaxbxcx", "/acb /cab"),
        ("/*ab$", "/ab /abab", "/aba"),
        ("/a*ab$", "/aab /axab", "/ab"),
        ("/$x", "/$x /%24x", "/ /x"),
        ("/*$", "/ /a /a?b", ""),
        ("$", "", "/ /a"),
        ("fish", "", "/ /fish"),
    ],
)
def test_special_characters(pattern: str, matching: str, others: str) -> None:
    assert verdicts(f"Disallow: {pattern}", *matching.split()) == [False] * len(matching.split())
    assert verdicts(f"Disallow: {pattern}", *others.split()) == [True] * len(others.split())


def test_a_rule_without_a_pattern_says_nothing() -> None:
    assert verdicts("Disallow:", "/", "/a") == [True, True]
    assert verdicts("Disallow: /\nAllow:", "/a") == [False]
    assert verdicts("Disallow: # all of it", "/a") == [True]


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz"),
        ("/foo/bar?baz=https://foo.bar", "/foo/bar?baz=https%3A%2F%2Ffoo.bar"),
        ("/foo/bar?baz=https%3a%2f%2ffoo.bar", "/foo/bar?baz=https://foo.bar"),
        ("/foo/bar/ツ", "/foo/bar/%E3%83%84"),
        ("/foo/bar/%e3%83%84", "/foo/bar/ツ"),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz"),
        ("/foo/bar/baz", "/foo/bar/%62%61%7A"),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-*.html"),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-%2a.html"),
        ("/path/foo-%24", "/path/foo-$"),
        ("/a b|c", "/a%20b%7Cc"),
        ("/[x]", "/[x]"),
        ("/?q[x]", "/?q%5Bx%5D"),
        ("/100%", "/100%"),
    ],
)
def test_escapes_do_not_matter(pattern: str, path: str) -> None:
    assert verdicts(f"Disallow: {pattern}$", path, path + "x") == [False, True]


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/a%2Fb", "/a/b"),  # an escaped slash parts no folders
        ("/a%3Fb", "/a?b"),
        ("/?a%26b", "/?a&b"),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-x.html"),
        ("/%2562", "/b"),  # escaped twice is read once
    ],
)
def test_some_escapes_do_matter(pattern: str, path: str) -> None:
    assert verdicts(f"Disallow: {pattern}", path) == [True]


def test_robots_txt_itself_is_always_allowed() -> None:
    assert verdicts("Disallow: /", "/robots.txt", "/robots.txt.jpg", "") == [True, False, False]


def as_expression(pattern: str) -> str:
    to_the_end = pattern.endswith("$")
    body = ".*".join(re.escape(piece) for piece in pattern.removesuffix("$").replace("$", "%24").split("*"))
    return body + (r"\Z" if to_the_end else "")


@given(pattern=st.text("ab/*$", max_size=8), path=st.text("ab/", max_size=10))
def test_patterns_match_what_a_regular_expression_does(pattern: str, path: str) -> None:
    expected = re.match(as_expression("/" + pattern), "/" + path) is None
    assert verdicts(f"Disallow: /{pattern}", "/" + path) == [expected]


@given(st.lists(st.tuples(st.booleans(), st.text("ab*$", max_size=4)), max_size=5), st.text("ab", max_size=5))
def test_the_order_of_rules_does_not_matter(rules: list[tuple[bool, str]], path: str) -> None:
    lines = [f"{'Allow' if allows else 'Disallow'}: /{pattern}" for allows, pattern in rules]
    assert len({tuple(verdicts("\n".join(order), "/" + path)) for order in (lines, lines[::-1], sorted(lines))}) == 1


# ---- files that mean harm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"Crawl-delay: \xc2\xb2",
        b"Crawl-delay: " + b"9" * 5000,
        b"Request-rate: \xc2\xb2/\xc2\xb2",
        b"Request-rate: " + b"9" * 5000 + b"/1",
        b"Disallow: //[half",
        b"Disallow: http://[half",
        b"Allow: \xff\xfe\0\x1c%zz%",
        b"User-agent\xff: \xff",
        b":::::",
        b"\0" * 1000,
    ],
)
def test_no_line_keeps_the_others_from_being_read(line: bytes) -> None:
    content = b"User-agent: *\nDisallow: /a\n" + line + b"\nDisallow: /b\n"
    assert [allowed(content, path) for path in ("/a", "/b", "/c")] == [False, False, True]


@given(st.binary(max_size=300), st.text("ab/*$%?é2", max_size=20))
def test_every_file_can_be_read(content: bytes, path: str) -> None:
    for start in (b"", b"User-agent: *\nDisallow: "):
        assert allowed(start + content, "/" + path) in (True, False)


def test_what_lies_behind_the_limit_is_not_read() -> None:
    head = b"User-agent: *\nDisallow: /a\n"
    assert MAX_BYTES >= 500 * 1024
    content = head + b"#" * (MAX_BYTES - len(head) - 1) + b"\nDisallow: /b\n"
    assert [allowed(content, path) for path in ("/a", "/b")] == [False, True]


LONG = "a" * 15_000


@pytest.mark.parametrize(
    "content",
    [
        b"Disallow: /" + b"*a" * 250_000 + b"*b",
        b"Disallow: /" + b"*" * 500_000 + b"b",
        (b"Disallow: /" + b"*a" * 100 + b"*b\n") * 2400,
        b"".join(b"Disallow: /*a*a*a*a*a*a*%d$\n" % number for number in range(15_000)),
        # Each is looked for from every place of the URL, up to its middle.
        b"".join(b"Disallow: /*" + b"a" * 40 + b"b%d" % number + b"a" * 40 + b"\n" for number in range(5_000)),
        b"".join(b"Disallow: /%d\n" % number for number in range(30_000)),
        b"User-agent: ExampleBot\n" * 10_000 + b"".join(b"Disallow: /%d\n" % number for number in range(15_000)),
        b"User-agent: a\n" * 10_000 + b"Disallow: /\n" * 20_000,
        b"Disallow: /" + b"%41" * 170_000,
        b"\n" * 500_000,
    ],
)
def test_reading_and_matching_end_soon(content: bytes) -> None:
    """Without a bound, some of these take minutes, and one of them for ever; here a fraction of a second."""
    started_at = time.process_time()
    rules = RobotsRules(b"User-agent: *\n" + content, "ExampleBot")
    read_s = time.process_time() - started_at
    rules.allow(f"{HOST}/{LONG}")
    assert read_s < 5
    assert time.process_time() - started_at - read_s < 0.5


def test_a_url_that_the_rules_cannot_be_held_against_is_refused() -> None:
    rules = b"".join(b"Disallow: /*folder%d/*.jpg$\n" % number for number in range(500))
    assert allowed(b"User-agent: *\n" + rules, f"/{LONG[:2000]}"), "hundreds of rules are usual"
    assert not allowed(b"User-agent: *\n" + rules, f"/{LONG}")
    assert allowed(b"User-agent: *\n" + rules.replace(b"*", b""), f"/{LONG}"), "plain ones cost next to nothing"
