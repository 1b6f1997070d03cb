"""The commands that hand a config over to a Prefect server: deploy, and serve for one machine."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flows.console import print_json
from flows.prefect_server import ServerError, refuse_unreachable, user_api_url
from flows.selection import select
from stages.errors import ConfigError

if TYPE_CHECKING:
    from flows.deployment import Deployed


def deploy_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip deploy``."""
    serve_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip serve``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="its runs leave out the stages before it")
    parser.add_argument("--until", metavar="STAGE", help="its runs leave out the stages after it")
    parser.add_argument(
        "--retrain", action="store_true", help="its runs are those of `unclip retrain`: new data, gate, promotion"
    )
    parser.add_argument("--no-promote", action="store_true", help="with --retrain: register and ask the gate, no more")


def deploy(args: argparse.Namespace) -> int:
    """Register the deployment of a config, and say how it is run."""
    deployed = _deploy(args)
    if args.json:
        print_json(vars(deployed))
        return 0
    print(f"deployed {_shown(deployed)}; a worker takes its runs: prefect worker start --pool {deployed.pool}")
    for name in (deployed.watch, *deployed.automations):
        if name is not None:
            print(f"  with {name}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """Register the deployment, and become the worker that takes its runs."""
    from stages.config import load_config

    kind = load_config(args.config, args.set).prefect.pool_kind
    if kind != "process":
        raise ConfigError(f"serve: prefect.pool_kind is {kind}; serve starts processes here, `unclip deploy` does not")
    deployed = _deploy(args)
    print(f"deployed {_shown(deployed)}; its runs are taken here until Ctrl-C", flush=True)
    # The worker in this one's place: signals are its own.
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", deployed.pool, "--type", "process"]
    os.execv(sys.executable, command)


def _shown(deployed: Deployed) -> str:
    return f"{deployed.name} ({deployed.work}, code {deployed.version})"


def _deploy(args: argparse.Namespace) -> Deployed:
    from stages.config import load_config

    if args.retrain and (args.start or args.until):
        raise ConfigError("--retrain: does all stages; leave out --from and --until")
    if args.no_promote and not args.retrain:
        raise ConfigError("--no-promote: is of retraining; add --retrain")
    config = load_config(args.config, args.set)
    url = user_api_url()
    if not url:
        raise ServerError(
            "no Prefect server is set; start one (`prefect server start`) and set PREFECT_API_URL, or choose a profile "
            "that names one (`prefect profile use`)"
        )
    refuse_unreachable(url)
    from flows import deployment
    from stages.graph import STAGE_NAMES

    name = config.prefect.deployment or Path(args.config).stem
    if args.retrain:
        return deployment.deploy(config, name, "retrain", promote=not args.no_promote)
    stages = {"start": args.start, "until": args.until}
    select(STAGE_NAMES, **stages)
    return deployment.deploy(config, name, "run", **stages)
