"""``unclip takedown``: remove samples from everything a store holds, and keep them out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from flows.console import PLAIN, open_console, print_json
from stages.config import load_config
from stages.errors import ConfigError, ConflictError, InputError
from stages.lease import working
from stages.registry import read_production
from stages.takedown import Affected, find_affected, take_down, widened
from stages.tombstones import Tombstones, add_tombstones, read_tombstones


def takedown_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip takedown``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--url", action="append", default=[], metavar="URL", help="as the list has it; repeatable")
    parser.add_argument("--key", action="append", default=[], metavar="KEY", help="of a sample; repeatable")
    parser.add_argument("--sha256", action="append", default=[], metavar="HASH", help="of an image file; repeatable")
    parser.add_argument("--file", metavar="FILE", help="one URL, key or hash per line")
    parser.add_argument("--note", default="", metavar="TEXT", help="why; kept with the tombstones")
    parser.add_argument(
        "--apply",
        action="store_true",
        help="do it; without, only show what it would touch; alone: finish what was interrupted",
    )
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def takedown(args: argparse.Namespace) -> int:
    """Show what a takedown touches, or do it."""
    asked = Tombstones(
        urls=frozenset(args.url),
        keys=frozenset(key.strip().lower() for key in args.key),
        sha256=frozenset(name.strip().lower() for name in args.sha256),
    )
    if any(not url.strip() for url in args.url):
        raise ConfigError("--url: is empty; is a variable of the shell not set?")
    if args.file is not None:
        asked |= _from_file(Path(args.file))
    config = load_config(args.config, args.set)
    root, ttl_s = config.root, config.cluster.lease_ttl_s
    if not asked and not args.apply:
        raise ConfigError("takedown: name what is meant by --url, --key, --sha256 or --file")
    meant = widened(root, asked)
    if args.apply:
        if asked:
            add_tombstones(root, meant, args.note)
        _refuse_beside_a_run(root, ttl_s, "the tombstones are up, and nothing is removed yet")
        # All tombstones, so that a takedown which was interrupted is finished too.
        affected = take_down(root, read_tombstones(root))
        _refuse_beside_a_run(root, ttl_s, "a run has begun meanwhile, and may have read what is removed now")
    else:
        affected = find_affected(root, meant)
    if args.json:
        print_json({"applied": args.apply, "unknown": _unknown(asked, affected), **affected.to_json()})
        return 0
    console = open_console(sys.stdout)
    for name in _unknown(asked, affected):
        fate = "if a list brings it, it will be refused" if args.apply else "misspelt, or taken down before?"
        console.print(f"unknown {name}  no image here has this name; {fate}", soft_wrap=True, **PLAIN)
    _show(console, affected, read_production(root).number, applied=args.apply)
    return 0


def _refuse_beside_a_run(root: str, ttl_s: float, state: str) -> None:
    """Refuse to go on beside a run: what it makes of samples it has read would be left.

    Raises:
        ConflictError: names the stages and who works on them.
    """
    busy = working(root, ttl_s=ttl_s) if ttl_s else {}
    if busy:
        listed = ", ".join(f"{name.partition('/')[0]} by {holding}" for name, holding in sorted(busy.items()))
        raise ConflictError(
            f"takedown: {state}, but {listed}; stop that run (Ctrl-C, or unclip cancel) or wait for its end, then give "
            "the same command again"
        )


def _unknown(asked: Tombstones, affected: Affected) -> list[str]:
    """Return what was asked for and is in no sample."""
    known = {sample[name] for sample in affected.samples for name in ("key", "url", "sha256")}
    return sorted((asked.urls | asked.keys | asked.sha256) - known)


def _from_file(path: Path) -> Tombstones:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file: {path} cannot be read ({error})") from None
    if not lines:
        raise InputError(f"--file: {path} names nothing; a takedown of nothing is none")
    names: dict[str, set[str]] = {"urls": set(), "keys": set(), "sha256": set()}
    for line in lines:
        kind = "urls" if "://" in line else "sha256" if len(line) == 64 else "keys"
        names[kind].add(line if kind == "urls" else line.lower())
    return Tombstones(**{kind: frozenset(values) for kind, values in names.items()})


def _show(console: Console, affected: Affected, production: int | None, *, applied: bool) -> None:
    def say(text: str) -> None:
        console.print(text, soft_wrap=True, **PLAIN)

    for sample in affected.samples:
        say(f"sample  {sample['key']}  {sample['url']}  in {sample['shard']}")
    exposed = affected.exposed
    for model in exposed.models:
        say(f"model   {model['stage']} {model['fingerprint']} learned from them: {model['weights']}")
    for folder in exposed.checkpoints:
        say(f"checkpoints of such a training, or of an unfinished one that may have read them: {folder}")
    for number, models in exposed.versions.items():
        verb = "is withdrawn" if applied else "would be withdrawn"
        say(f"version {number} {verb}: {', '.join(models)}{'; IT IS IN PRODUCTION' if number == production else ''}")
    verb = "removed" if applied else "would be removed"
    say(
        f"{len(affected.samples)} samples of {len(affected.shards)} shards, {len(affected.derived)} files made from "
        f"these shards, and {len(exposed.pictures)} pictures of trainings, {verb}; {len(exposed.models)} models "
        "learned from them"
    )
    if production in exposed.versions:
        say(
            "what is in production was trained on them: `unclip rollback` to a version that was not, or "
            "`unclip retrain --from-scratch`"
        )
    if not applied and affected.samples:
        say("add --apply to do it")
    elif affected.samples:
        say(
            "`unclip run` makes the affected shards anew and trains anew; the models and checkpoints named above are "
            "yours to delete"
        )
