"""The command that compares variants of a config: ablate."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from flows.interrupt import Interrupt
from flows.prefect_server import PrivateServer, user_api_url
from stages.errors import ConfigError

if TYPE_CHECKING:
    from flows.ablation import AblationRun
    from stages.ablation import AblationConfig
    from stages.executor import ClusterConfig


def ablate_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip ablate``."""
    parser.add_argument("ablation", metavar="ABLATION", help="YAML file of variants, e.g. configs/ablation.yaml")
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="K=V", help="change a setting of all variants"
    )
    parser.add_argument("--json", action="store_true", help="print JSON to standard output instead of the table")


def ablate(args: argparse.Namespace) -> int:
    """Train and judge every variant, then hold the claims against the results."""
    from stages.config import load_ablation, load_config

    config, trials = load_ablation(args.ablation, args.set)
    base = Path(args.ablation).parent / config.base
    root = load_config(base, args.set).root
    from flows.ablation import open_ablation
    from flows.ablation_report import refuse_what_is_not_measured

    refuse_what_is_not_measured(config, base, trials)
    run = open_ablation(base, trials)
    errors = Console(file=sys.stderr)
    if run.pending:
        _refuse_jobs(run.cluster)
        with Interrupt(on_stop=lambda: print("unclip: stopping; what is done is kept", file=sys.stderr)) as interrupt:
            run.interrupt = interrupt
            try:
                _run(run, f"{Path(args.ablation).stem} in {root}")
            except KeyboardInterrupt:
                return interrupt.exit_code or 130
        if run.errors:
            for line in run.errors:
                errors.print(
                    f"unclip: {line}", style="red" if errors.is_terminal else None, soft_wrap=True, markup=False
                )
            return 1
    return _publish(args, config, run, root)


def _refuse_jobs(cluster: ClusterConfig) -> None:
    if cluster.submit is not None:
        raise ConfigError(
            f"cluster.submit: {cluster.submit}: an ablation is driven from here and is no Ray Job; set -s "
            "cluster.submit=null, and cluster.address to the cluster's (ray://HEAD:10001) to work there"
        )


def _run(run: AblationRun, name: str) -> None:
    from stages.storage import check_writable

    check_writable(next(iter(run.nodes.values())).stage.root)
    server = None if user_api_url() else PrivateServer()
    with contextlib.redirect_stdout(sys.stderr), server or contextlib.nullcontext():
        from flows.ablation import run_ablation
        from flows.pipeline import open_executor
        from stages.generator_training import Training

        for node in run.nodes.values():
            if isinstance(node.stage, Training):
                node.stage.settle()
        run.executor = open_executor(run.cluster, run.interrupt)
        try:
            run_ablation(run, name=name, server=server)
        finally:
            run.executor.close()


def _publish(args: argparse.Namespace, config: AblationConfig, run: AblationRun, root: str) -> int:
    from flows.ablation_report import Findings, findings_json
    from stages import storage

    findings = Findings(config, {trial: run.manifests[key].metrics for trial, key in run.results.items()})
    stem = Path(args.ablation).stem
    folder = storage.join(root, "ablation", stem)
    text, table = findings_json(findings), findings.to_markdown()
    storage.write_bytes(storage.join(folder, "results.json"), text.encode())
    storage.write_bytes(storage.join(folder, "table.md"), table.encode())
    storage.write_bytes(storage.join(folder, "index.html"), findings.to_html(f"unCLIP {stem}").encode())
    print(text if args.json else f"{table}\n{storage.join(folder, 'index.html')}", end="" if args.json else "\n")
    return 0
