"""The command line ``unclip``.

Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 refused by the gate, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from flows import (
    cli_ablate,
    cli_backfill,
    cli_cost,
    cli_deploy,
    cli_exchange,
    cli_images,
    cli_jobs,
    cli_ledger,
    cli_operate,
    cli_registry,
    cli_render,
    cli_retrain,
    cli_store,
    cli_takedown,
)
from flows.console import PLAIN, open_console, print_json
from flows.interrupt import Interrupt
from flows.logs import configure_logging
from flows.overview import overview, plan_table
from flows.prefect_server import PrivateServer, user_api_url
from flows.progress import Outcome, open_display
from flows.project import Project, open_project
from flows.selection import Selection, check_upstream, select
from stages.errors import ConfigError, UnclipError
from stages.redaction import hide_secrets

if TYPE_CHECKING:
    from flows.tasks import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: without the program's name; those of the process if not given.
    """
    errors = open_console(sys.stderr)
    try:
        args = build_parser().parse_args(arguments)
    except ConfigError as error:
        _show_error(errors, str(error))
        return error.exit_code
    configure_logging(errors, debug=args.debug)
    try:
        return int(args.command(args))
    except UnclipError as error:
        if args.debug:
            errors.print_exception()
        _show_error(errors, str(error))
        if getattr(args, "json", False):
            print_json({"status": "failed", "errors": [str(error)]})
        return error.exit_code
    except KeyboardInterrupt:
        _show_error(errors, "stopped; everything committed is kept")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`unclip plan | head`); nothing is wrong, and nothing can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            errors.print_exception()
        _show_error(errors, f"{type(error).__name__}: {error}; this is a bug: run again with --debug and report it")
        return 1


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and say what was meant."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        given = message.removeprefix("argument COMMAND: invalid choice: '").partition("'")[0]
        if message.startswith("argument COMMAND: invalid choice"):
            close = difflib.get_close_matches(given, _COMMANDS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"the commands are: {', '.join(_COMMANDS)}"
            raise ConfigError(f"{given}: no such command; {hint}")
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser(prog="unclip", description="Data and training pipeline for unCLIP (DALL-E 2).")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (command, describe, help_text) in _COMMANDS.items():
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(command=command)
        sub.add_argument("--debug", action="store_true", help="show tracebacks and every log line")
        describe(sub)
    return parser


def _config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help="YAML file")
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="K=V", help="change a setting, e.g. decoder.num_steps=100"
    )


def _json_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    _config_arguments(parser, optional=optional)
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _selection_arguments(parser)
    parser.add_argument("--detach", action="store_true", help="with cluster.submit: do not wait for the job")
    parser.add_argument(
        "--retry-failed", action="store_true", help="fetch again the rows whose download failed for reasons that pass"
    )
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics meanwhile; 0: any free port"
    )


def _adopt_arguments(parser: argparse.ArgumentParser) -> None:
    _json_arguments(parser)
    parser.add_argument("folder", metavar="FOLDER", help="webdataset output of img2dataset, local or s3://")


def _selection_arguments(parser: argparse.ArgumentParser) -> None:
    _json_arguments(parser)
    parser.add_argument("--from", dest="start", metavar="STAGE", help="leave out the stages before it")
    parser.add_argument("--until", metavar="STAGE", help="leave out the stages after it")
    parser.add_argument("--only", metavar="STAGE", help="this stage alone")
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="run it anew even if done; repeatable"
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _selection_arguments(parser)
    cli_cost.cost_arguments(parser)


def _config_command_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser, optional=True)
    parser.add_argument("--reference", action="store_true", help="print docs/config.md: every setting there is")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    _json_arguments(parser, optional=True)


# ---- what all commands share ----------------------------------------------------------------------------------------


def _selection(args: argparse.Namespace) -> Selection:
    from stages.graph import STAGE_NAMES

    return select(STAGE_NAMES, start=args.start, until=args.until, only=args.only, force=args.force)


def _show_error(console: Console, message: str) -> None:
    message = hide_secrets(message)
    console.print(f"unclip: {message}", style="red" if console.is_terminal else None, soft_wrap=True, **PLAIN)


# ---- run ------------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    selection = _selection(args)
    if args.metrics_port is not None:
        args.set = [*args.set, f"cluster.metrics_port={args.metrics_port}"]
    project = _open_to_run(args)
    if args.retry_failed:
        project = _retry_failed(args, project, selection)
    check_upstream(
        selection,
        {name: stage.upstream for name, stage in project.stages.items()},
        {name: state.status == "done" for name, state in project.states.items()},
    )
    pending = [name for name in selection.stages if project.states[name].status != "done"]
    if not pending and not selection.forced:
        return _say_nothing_to_do(args, project, selection)
    return _bring_to_end(args, project, selection)


def _open_to_run(args: argparse.Namespace) -> Project:
    """Open the project of a run; refuse to detach from one that is this very process."""
    project = open_project(args.config, args.set)
    if args.detach and project.config.cluster.submit is None:
        raise ConfigError(
            "--detach: this run is no Ray Job, it would end with this command; set cluster.submit to a cluster's "
            "dashboard (-s cluster.submit=http://head:8265), or leave out --detach and keep the command running"
        )
    return project


def _bring_to_end(args: argparse.Namespace, project: Project, selection: Selection) -> int:
    _say_list_changes(project)
    if project.config.cluster.submit is not None:
        return cli_jobs.run_as_job(args, project, selection)
    return _run_stages(args, project, selection)


def _retrain(args: argparse.Namespace) -> int:
    return cli_retrain.retrain(args, _bring_to_end)


def _backfill(args: argparse.Namespace) -> int:
    return cli_backfill.backfill(args, _bring_to_end)


def _retry_failed(args: argparse.Namespace, project: Project, selection: Selection) -> Project:
    """Ask for another try of the failed rows; return the project with a download that is to be continued."""
    from stages.failure_codes import is_transient
    from stages.retries import request_retries

    if "download" not in selection.stages:
        raise ConfigError("--retry-failed: download is not among the stages of this run; leave out --from or --only")
    if "download" not in project.manifests:
        raise ConfigError("--retry-failed: the download has not finished; `unclip run` finishes it")
    counts = request_retries(project.manifests["download"], is_transient)
    listed = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(counts.items()))
    said = (
        f"{sum(counts.values()):,} rows are tried again ({listed})"
        if counts
        else "no row failed for a reason that passes"
    )
    open_console(sys.stderr).print(said, soft_wrap=True, **PLAIN)
    return open_project(args.config, args.set)


def _retry(args: argparse.Namespace) -> int:
    """Try the shards again that finished stages have given up on, then run."""
    selection = _selection(args)
    given_up = cli_operate.reopen_quarantined(_open_to_run(args), selection.stages)
    listed = ", ".join(f"{name}: {count:,}" for name, count in given_up.items())
    said = f"{listed} shards are tried again" if given_up else "no finished stage has quarantined shards"
    open_console(sys.stderr).print(said, soft_wrap=True, **PLAIN)
    return _run(args)


def _adopt(args: argparse.Namespace) -> int:
    """Take an existing output of img2dataset for the download's result."""
    from stages.adopt import Adoption, check_adoptable

    project = open_project(args.config, args.set)
    config = project.config
    num_tables = check_adoptable(args.folder, config.source)
    if "download" in project.manifests:
        raise ConfigError("adopt: the download has finished already; `unclip status` shows it")
    open_console(sys.stderr).print(f"{num_tables:,} tables in {args.folder}", soft_wrap=True, **PLAIN)
    adoption = Adoption(config.download, root=config.root, folder=args.folder)
    project = replace(project, stages={**project.stages, "download": adoption})
    return _run_stages(args, project, Selection(("source", "download")))


def _say_list_changes(project: Project) -> None:
    """Say what has changed in the URL lists since the store last read them."""
    source = project.stages["source"]
    if project.states["source"].status == "done":
        return
    from stages.source import Source

    console = open_console(sys.stderr)
    for change in source.changes() if isinstance(source, Source) else []:
        console.print(f"list {change}", soft_wrap=True, **PLAIN)


def _say_nothing_to_do(args: argparse.Namespace, project: Project, selection: Selection) -> int:
    """Answer for a finished pipeline without starting Prefect or Ray."""
    from flows.summary import is_current, report_uri, run_to_json, write_summary

    if not is_current(project.manifests, project.config):
        write_summary(project.manifests, project.config)
    outcomes = [
        Outcome(stage=name, status="cached", manifest=project.states[name].manifest) for name in selection.stages
    ]
    with open_display(open_console(sys.stderr)) as display:
        for outcome in outcomes:
            display.end(outcome)
    report = report_uri(project.config.root)
    if args.json:
        print_json(run_to_json("done", project.config.root, report, outcomes, project.fingerprints, []))
    else:
        print(f"nothing to do; report: {report}")
    return 0


def _run_stages(args: argparse.Namespace, project: Project, selection: Selection) -> int:
    """Run the flow. What takes long to start is started first: Prefect's server, then Ray, then the imports."""
    from flows.run_project import run_project
    from flows.summary import run_to_json
    from stages.storage import check_writable

    root = project.config.root
    check_writable(root)
    console = open_console(sys.stderr)
    server = None if user_api_url() else PrivateServer()
    if server is not None:
        server.start()

    def execute(run: Run) -> BaseException | None:
        from flows.pipeline import run_name, run_pipeline

        return run_pipeline(run, name=run_name(args.config, root), server=server)

    def say_stopping() -> None:
        _show_error(console, "stopping; everything committed is kept, the same command goes on from there")

    # What libraries print meanwhile must not mix with the answer on stdout.
    with (
        server or contextlib.nullcontext(),
        Interrupt(on_stop=say_stopping) as interrupt,
        open_display(console) as shown,
        contextlib.redirect_stdout(sys.stderr),
    ):
        ended = run_project(project, selection, args.config, execute, interrupt=interrupt, shown=shown)
    for line in ended.errors if ended.status == "failed" else []:
        _show_error(console, line)
    if args.json:
        outcomes = list(ended.outcomes.values())
        print_json(run_to_json(ended.status, root, ended.report_uri, outcomes, project.fingerprints, ended.errors))
    elif ended.report_uri:
        print(f"report: {ended.report_uri}")
    return ended.exit_code


# ---- the other commands ---------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> int:
    selection = _selection(args)
    project = open_project(args.config, args.set)
    _say_list_changes(project)
    if args.cost:
        return cli_cost.show_cost(args, project)
    cli_cost.refuse_without_cost(args)
    rows = overview(project.stages, project.states, selected=selection.stages, forced=selection.forced)
    if args.json:
        print_json([row.to_json() for row in rows])
    else:
        open_console(sys.stdout).print(plan_table(rows))
    return 0


def _models_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] [list] CONFIG [-s K=V] [--json]"
    parser.add_argument("action", nargs="?", choices=("list",), help="the registered versions, not the sizes")
    _json_arguments(parser)


def _models(args: argparse.Namespace) -> int:
    if args.action == "list":
        return cli_registry.list_versions(args)
    from rich import box
    from rich.table import Table

    from flows.model_sizes import model_sizes
    from stages.config import load_config

    sizes = model_sizes(load_config(args.config, args.set))
    if args.json:
        print_json([size.to_json() for size in sizes])
        return 0
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("model", "kind", "parameters", "fp32 weights"):
        table.add_column(name, justify="left" if name in ("model", "kind") else "right")
    for size in sizes:
        count = size.num_parameters
        known = (f"{count:,}", f"{count * 4 / 2**20:,.1f} MiB") if count is not None else ("not fetched yet", "")
        table.add_row(size.model, size.kind, *known)
    open_console(sys.stdout).print(table)
    return 0


def _config(args: argparse.Namespace) -> int:
    if args.reference:
        from flows.config_reference import reference

        print(reference(), end="")
        return 0
    if args.config is None:
        raise ConfigError("the following arguments are required: CONFIG (or --reference); see unclip config --help")
    from stages.config import load_config, to_yaml

    print(to_yaml(load_config(args.config, args.set)), end="")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from flows.doctor import examine, findings_table

    config = None
    if args.config is not None:
        from stages.config import load_config

        config = load_config(args.config, args.set)
    findings = examine(config)
    if args.json:
        print_json([finding.to_json() for finding in findings])
    else:
        open_console(sys.stdout).print(findings_table(findings))
    return 1 if any(finding.level == "problem" for finding in findings) else 0


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None], str]] = {
    "run": (_run, _run_arguments, "bring the pipeline to its end; done stages are not repeated"),
    "cancel": (cli_jobs.cancel, cli_jobs.cancel_arguments, "stop the Ray Job that runs this config"),
    "deploy": (
        cli_deploy.deploy,
        cli_deploy.deploy_arguments,
        "register runs by schedule, by new URL lists and by hand with a Prefect server",
    ),
    "serve": (cli_deploy.serve, cli_deploy.serve_arguments, "deploy, and take the runs in processes of this machine"),
    "adopt": (_adopt, _adopt_arguments, "take over the images that img2dataset has downloaded before"),
    "retry": (_retry, _run_arguments, "try the quarantined shards again, and bring the pipeline to its end"),
    "backfill": (_backfill, cli_backfill.backfill_arguments, "process the lists of past days, one after the other"),
    "plan": (_plan, _plan_arguments, "show what is done, what will run and why, and what it will take"),
    "status": (cli_operate.status, cli_operate.status_arguments, "show what the store holds"),
    "runs": (cli_operate.runs, cli_operate.runs_arguments, "show who ran what when, and how it ended"),
    "logs": (cli_operate.logs, cli_operate.logs_arguments, "print the log of a run, of all stages or of one"),
    "funnel": (cli_ledger.funnel, cli_ledger.funnel_arguments, "show what every stage dropped, and why"),
    "explain": (cli_ledger.explain, cli_ledger.explain_arguments, "tell what became of one sample, and why"),
    "what-if": (cli_ledger.what_if_, cli_ledger.what_if_arguments, "show what other thresholds would keep, in seconds"),
    "takedown": (
        cli_takedown.takedown,
        cli_takedown.takedown_arguments,
        "remove samples from everything and keep them out",
    ),
    "generate": (
        cli_images.generate,
        cli_images.generate_arguments,
        "make images from a caption with the trained models",
    ),
    "vary": (cli_images.vary, cli_images.vary_arguments, "make variations of a picture"),
    "interpolate": (cli_images.interpolate, cli_images.interpolate_arguments, "blend two pictures"),
    "edit": (cli_images.edit, cli_images.edit_arguments, "change a picture by a caption, or paint a part of it"),
    "invert": (cli_images.invert, cli_images.invert_arguments, "find the noise a picture decodes from, and check it"),
    "probe": (cli_images.probe, cli_images.probe_arguments, "show a picture with fewer principal components"),
    "export": (cli_exchange.export, cli_exchange.export_arguments, "write the trained models for other software"),
    "export-embeddings": (
        cli_exchange.export_embeddings,
        cli_exchange.export_embeddings_arguments,
        "write the embeddings in clip-retrieval's layout",
    ),
    "import": (cli_exchange.import_, cli_exchange.import_arguments, "take over weights of other software"),
    "verify": (
        cli_store.verify,
        cli_store.verify_arguments,
        "hold every file, record and count to the manifests",
    ),
    "repair": (cli_store.repair, cli_store.repair_arguments, "have damaged work, and nothing else, done again"),
    "gc": (cli_store.gc, cli_store.gc_arguments, "show or delete what nothing in the store needs any more"),
    "retrain": (
        _retrain,
        cli_retrain.retrain_arguments,
        "process what is new, train on from production, ask the gate, promote",
    ),
    "promote": (
        cli_registry.promote,
        cli_registry.promote_arguments,
        "put the finished run's models into production if the gate lets them",
    ),
    "rollback": (
        cli_registry.rollback,
        cli_registry.rollback_arguments,
        "put an earlier version of the models into production again",
    ),
    "diff": (cli_registry.diff, cli_registry.diff_arguments, "show what distinguishes two versions of the models"),
    "ablate": (cli_ablate.ablate, cli_ablate.ablate_arguments, "train variants of a config and compare them"),
    "render": (cli_render.render, cli_render.render_arguments, "write the files of a cluster: kubernetes or aws"),
    "models": (_models, _models_arguments, "show the size of every model; models list: the registered versions"),
    "config": (_config, _config_command_arguments, "print the config with every default written out"),
    "doctor": (_doctor, _doctor_arguments, "check this machine and say what to do"),
}


if __name__ == "__main__":
    sys.exit(main())
