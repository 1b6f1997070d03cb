"""``unclip run`` where ``cluster.submit`` names a cluster: as a Ray Job that is followed, found again, and stopped."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import sys
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.connection import passed_on
from flows.console import PLAIN, open_console, print_json
from flows.interrupt import Interrupt
from flows.progress import Outcome
from flows.project import Project, open_project
from flows.selection import Selection
from stages import storage
from stages.errors import ConfigError, UnclipError
from stages.manifest import digest_of

if TYPE_CHECKING:
    from cluster.jobs import JobState
    from stages.config import Config

logger = logging.getLogger(__name__)

_PREFECT = "PREFECT_API_URL"
_OUR_FAILURES = (1, 2, 130, 143)
_STATUS = {0: "done", 130: "cancelled", 143: "cancelled"}


def run_as_job(args: argparse.Namespace, project: Project, selection: Selection, *, takes_signals: bool = True) -> int:
    """Run the selected stages on the cluster; return the exit code that a run here would have had.

    Args:
        args: of the command line.
        project: what to run.
        selection: the stages of it.
        takes_signals: whether to handle signals; if not, what somebody else's handler raises stops the job and is
            raised again once the job has ended.
    """
    from cluster.jobs import CONFIG_NAME, STOP_WAIT_S, JobCluster

    config = project.config
    assert config.cluster.submit is not None
    environment = _environment(config)
    cluster = JobCluster(config.cluster.submit)
    console = open_console(sys.stderr)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, **PLAIN)

    def show(text: str) -> None:
        console.print(text, soft_wrap=True, end="", **PLAIN)

    what = _what(project, selection)

    def say_stopping() -> None:
        say("stopping the job; everything committed is kept")

    errors: list[str] = []

    def stop() -> None:
        try:
            states = cluster.stop_all(what, timeout_s=STOP_WAIT_S + 3)
        except UnclipError as error:
            errors.append(str(error))
        else:
            errors.extend(f"job {name}: it still runs; `unclip cancel` stops it" for name in _going_on(states))
        for text in errors:
            say(text)

    deadline_s = STOP_WAIT_S + 5
    with Interrupt(deadline_s, say_stopping, outlived=True, takes_signals=takes_signals) as interrupt:
        interrupt.closes(stop)
        state: JobState | None = None
        try:
            name, is_new = cluster.submit(
                what,
                ["run", CONFIG_NAME, *_selection_arguments(selection)],
                config=_for_the_cluster(config),
                environment=environment,
                with_code=config.cluster.code == "upload",
                labels={"config": Path(args.config).name, "root": storage.absolute(config.root)},
            )
            say(f"job {name} at {config.cluster.submit}: {'submitted' if is_new else 'is running already; attached'}")
            if args.detach:
                if args.json:
                    print_json({"status": "submitted", "job": name})
                return 0
            state = cluster.follow(name, show)
        except KeyboardInterrupt:
            interrupt.stop(128 + signal.SIGINT)
            if not takes_signals:  # whoever does has to hear of it
                raise
        except Exception:
            raise  # the job may go on
        except BaseException:  # a signal, as whoever handles it says so
            interrupt.stop(128 + signal.SIGTERM)
            raise
    code = _exit_code(state) if state is not None else interrupt.exit_code
    if state is not None and code:
        errors.append(f"job {name}: {state.status.lower()}: {state.message}")
        say(errors[-1])
    if args.json:
        _answer(args, selection, _STATUS.get(code, "failed"), errors)
    return code


def _answer(args: argparse.Namespace, selection: Selection, status: str, errors: Sequence[str]) -> None:
    """Print what the store holds now, as a run here would."""
    from flows.summary import report_uri, run_to_json

    project = open_project(args.config, args.set)
    report = report_uri(project.config.root)
    found = {name: project.states[name].manifest for name in selection.stages}
    outcomes = [Outcome(stage=s, status="done" if m else "cancelled", manifest=m) for s, m in found.items()]
    print_json(run_to_json(status, project.config.root, report, outcomes, project.fingerprints, errors))


def _going_on(states: Mapping[str, JobState]) -> list[str]:
    return [name for name, state in states.items() if not state.is_over]


def cancel(args: argparse.Namespace) -> int:
    """Stop the jobs of a config: of its name and store, whatever its lists and settings were when they began."""
    from cluster.jobs import JobCluster
    from stages.config import load_config

    config = load_config(args.config, args.set)
    address = config.cluster.submit
    if address is None:
        raise ConfigError("cancel: cluster.submit names no cluster; a run on this machine is stopped by Ctrl-C")
    root = storage.absolute(config.root)
    names = {Path(args.config).stem, config.prefect.deployment}  # jobs of a deployment bear its name

    def is_meant(labels: Mapping[str, str]) -> bool:
        return labels.get("root") == root and _is_of(labels.get("config", ""), names)

    stopped = JobCluster(address).stop_all(is_meant=is_meant)
    going_on = _going_on(stopped)
    for name, state in stopped.items():
        then = "told to stop, has not ended yet" if name in going_on else "everything committed is kept"
        print(f"job {name}: {state.status.lower()}; {then}")
    if not stopped:
        print("no job of this config is running")
    return 1 if going_on else 0


def _is_of(label: str, names: Collection[str | None]) -> bool:
    """Tell whether a job's label, a file's name or a deployment's, which may hold dots, is one of these names."""
    return label in names or Path(label).stem in names


def cancel_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``unclip cancel``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")


def _project_name(project: Project) -> str:
    """Name what a config makes: where, and all fingerprints."""
    root = storage.absolute(project.config.root)
    return digest_of({"root": root, "stages": project.fingerprints})[:8]


def _what(project: Project, selection: Selection) -> str:
    """Name what a run makes: jobs that make the same have the same name."""
    chosen = {"stages": list(selection.stages), "forced": sorted(selection.forced)}
    return f"{_project_name(project)}-{digest_of(chosen)[:4]}"


def _selection_arguments(selection: Selection) -> list[str]:
    forced = [argument for name in sorted(selection.forced) for argument in ("--force", name)]
    return ["--from", selection.stages[0], "--until", selection.stages[-1], *forced]


def _for_the_cluster(config: Config) -> str:
    """Write the config as the job reads it: on the cluster it is in, with paths that hold in any folder."""
    from stages.config import to_yaml

    cluster = replace(config.cluster, submit=None, executor="ray", address="auto")
    source = replace(config.source, lists=tuple(storage.absolute(uri) for uri in config.source.lists))
    return to_yaml(replace(config, root=storage.absolute(config.root), cluster=cluster, source=source))


def _environment(config: Config) -> dict[str, str]:
    """Collect the variables that travel with the job.

    Raises:
        ConfigError: if one that the config names is not set here.
    """
    environment = passed_on(config.cluster)
    if _PREFECT in environment or not (url := os.environ.get(_PREFECT)):
        return environment
    if _is_loopback(url):
        logger.warning(
            "%s is on this machine (%s), where a job on a cluster does not find it: the job shows its stages on the "
            "server that the cluster's environment names, or on one of its own; cluster.pass_env: [%s] passes it on",
            *(_PREFECT, url, _PREFECT),
        )
        return environment
    return environment | {_PREFECT: url}


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _exit_code(state: JobState) -> int:
    if state.status == "STOPPED":
        return 130
    if state.status == "SUCCEEDED":
        return 0
    return state.exit_code if state.exit_code in _OUR_FAILURES else 1
