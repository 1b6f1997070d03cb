"""The flows that ``unclip deploy`` and ``unclip serve`` register; a worker imports them by this module's name.

``run`` and ``retrain`` do what the commands of these names do, in a worker's process; a deployment is of one of them.
Their parameter is the whole config as plain values, so that Prefect's form shows every setting, its server refuses a
wrong one, and the worker needs no file. ``watch`` looks at the URL lists and says once, as an event, that they hold
something new; an automation turns the event into a run.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from typing import Any

from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import Event, Resource
from prefect.events.clients import get_events_client
from prefect.events.related import related_resources_from_run_context
from prefect.logging.handlers import APILogHandler
from prefect.states import Completed

from flows import cli_jobs
from flows.console import open_console
from flows.interrupt import Interrupt
from flows.logs import PACKAGES, configure_logging, hide_secrets_from_prefect
from flows.pipeline import run_stages
from flows.prefect_server import user_api_url
from flows.production_note import publish_note
from flows.progress import LogDisplay
from flows.project import Project, project_of
from flows.retrain import retrain as retrain_models
from flows.run_project import run_project
from flows.selection import Selection, check_upstream, select
from flows.tasks import CURRENT_RUN, Run
from stages import storage
from stages.config import check_config, overridden
from stages.errors import NotFoundError, StageError, first_line
from stages.graph import STAGE_NAMES
from stages.manifest import digest_of
from stages.redaction import errors_without_secrets, hide_secrets
from stages.source import Source

logger = logging.getLogger(__name__)

FLOW_NAME, WATCH_NAME = "unclip", "unclip-watch"
LISTS_CHANGED = "unclip.lists.changed"
_NUM_RECONNECTIONS = 3  # more of them would be a second apart; the next look tries again anyway


@flow(name=FLOW_NAME, flow_run_name="{name}", persist_result=False)
def run(
    config: dict[str, Any],
    name: str = "unclip",
    overrides: Sequence[str] = (),
    start: str | None = None,
    until: str | None = None,
    only: str | None = None,
    force: Sequence[str] = (),
) -> str:
    """Bring the pipeline to its end; done stages are not repeated.

    Args:
        config: every setting, checked like a config file.
        name: of the config, shown and recorded.
        overrides: settings to change, as ``-s`` takes them.
        start: leave out the stages before it.
        until: leave out the stages after it.
        only: this stage alone.
        force: stages to run anew even if they are done.

    Returns:
        The URI of the report.

    Raises:
        StageError: if a stage failed; the same run again goes on from there.
    """
    _log_to_prefect()
    with errors_without_secrets():
        project = project_of(check_config(overridden(config, overrides), place=name))
        selection = select(STAGE_NAMES, start=start, until=until, only=only, force=force)
        upstream = {stage: project.stages[stage].upstream for stage in project.stages}
        check_upstream(selection, upstream, {stage: state.status == "done" for stage, state in project.states.items()})
        return _bring_to_end(project, selection, name)


@flow(name=FLOW_NAME, flow_run_name="{name}", persist_result=False)
def retrain(
    config: dict[str, Any],
    name: str = "unclip",
    overrides: Sequence[str] = (),
    promote: bool = True,
    from_scratch: bool = False,
) -> State[Any]:
    """Process what is new, train on from production, ask the gate, promote.

    Args:
        config: every setting, checked like a config file.
        name: of the config, shown and recorded.
        overrides: settings to change, as ``-s`` takes them.
        promote: put into production what the gate lets pass.
        from_scratch: train from random weights, not from those in production.

    Returns:
        A completed state that says how it ended; named ``Refused`` where the gate refuses: nothing has failed then,
        but somebody will want to know (``prefect.notify_on``).

    Raises:
        StageError: if a stage failed; the same run again goes on from there. Production is what it was.
    """
    _log_to_prefect()

    def look() -> Project:
        return project_of(check_config(overridden(config, overrides), place=name))

    def bring_to_end(project: Project, selection: Selection) -> int:
        _bring_to_end(project, selection, name)
        return 0

    with errors_without_secrets():
        found = retrain_models(look, bring_to_end, promote=promote, from_scratch=from_scratch)
        logger.info("%s", found.said)
        publish_note(found.root, found.said, found.decision)
    if found.status == "refused":
        assert found.decision is not None
        said = f"{found.said}: {'; '.join(found.decision.failures)}"
        return Completed(name="Refused", message=hide_secrets(said))
    return Completed(message=hide_secrets(found.said))


def _bring_to_end(project: Project, selection: Selection, name: str) -> str:
    """Do the stages of a selection, here or as a Ray Job; return the URI of the report."""
    storage.check_writable(project.config.root)
    if project.config.cluster.submit is not None:
        return _run_as_job(project, selection, name)
    with Interrupt(takes_signals=False) as interrupt:
        ended = run_project(project, selection, name, _run_here, interrupt=interrupt, shown=LogDisplay())
    if ended.status == "cancelled":  # by SIGINT; Prefect makes ``Crashed`` of it
        raise KeyboardInterrupt
    if ended.errors:
        raise StageError("; ".join(ended.errors))
    return ended.report_uri


def _log_to_prefect() -> None:
    """Show our lines in the worker's terminal and on the run's page; Prefect has been imported before it could know."""
    configure_logging(open_console(sys.stderr), debug=False)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        if not any(isinstance(handler, APILogHandler) for handler in logger.handlers):
            handler = APILogHandler()
            handler.addFilter(lambda record: FlowRunContext.get() is not None or TaskRunContext.get() is not None)
            logger.addHandler(handler)
    hide_secrets_from_prefect()


def _run_here(run: Run) -> BaseException | None:
    """Run the stages as tasks of the flow run this is called in."""
    run.shows_progress = True
    token = CURRENT_RUN.set(run)
    try:
        run_stages(run)
    except StageError as error:
        return error
    finally:
        CURRENT_RUN.reset(token)
    return None


def _run_as_job(project: Project, selection: Selection, name: str) -> str:
    """Follow the Ray Job that does the work; it shows its stages in a flow run of its own on the same server."""
    from flows.summary import report_uri

    of_run = argparse.Namespace(config=name, detach=False, json=False)
    code = cli_jobs.run_as_job(of_run, project, selection, takes_signals=False)
    if code:
        raise StageError(f"the Ray Job of {name} ended with exit code {code}; its log is above")
    return report_uri(project.config.root)


@flow(name=WATCH_NAME, flow_run_name="{name}", persist_result=False)
def watch(config: dict[str, Any], name: str = "unclip") -> list[str]:
    """Look at the URL lists; emit ``unclip.lists.changed`` once for every new content of them.

    Returns:
        What has changed, one line a list; nothing if nothing has, or if it has been said before.

    Raises:
        StageError: if the server does not take the event.
    """
    with errors_without_secrets():
        return _look_at_lists(config, name)


def _look_at_lists(config: dict[str, Any], name: str) -> list[str]:
    project = project_of(check_config(config))
    state, source = project.states["source"], project.stages["source"]
    uri = announced_uri(project.config.root, name)
    # The fingerprint holds the content of all lists: it is the name of what is new.
    if state.status == "done" or _announced(uri) == state.fingerprint:
        return []
    assert isinstance(source, Source)
    changes = [str(change) for change in source.changes()] or ["the lists have not been read before"]
    event = Event(
        event=LISTS_CHANGED,
        resource=Resource(lists_resource(project.config.root, name)),
        payload={"changes": [hide_secrets(change) for change in changes], "fingerprint": state.fingerprint},
    )
    asyncio.run(_deliver(event))
    # Written once the server has it: a watcher that ends between the two says it twice, and never not at all.
    storage.write_json(uri, {"deployment": name, "fingerprint": state.fingerprint})
    return changes


async def _deliver(event: Event) -> None:
    """Send an event and wait until the server has received it; Prefect's ``emit_event`` would only put it in a queue.

    Raises:
        StageError: if it could not be sent.
    """
    try:
        # A checkpoint after every event is a ping after it, whose answer comes once the event is there.
        client = get_events_client(reconnection_attempts=_NUM_RECONNECTIONS, checkpoint_every=1)
        async with client, get_client() as about_this_run:
            event.related += await related_resources_from_run_context(about_this_run)
            await client.emit(event)
    except Exception as error:
        raise StageError(
            f"{event.event}: {user_api_url()} does not take the event ({first_line(error)}); see that the server is up "
            "and that websockets reach it; the next look says it again"
        ) from error


def lists_resource(root: str, name: str) -> dict[str, str]:
    """Name the lists of a store as a resource of events."""
    return {
        "prefect.resource.id": f"unclip.lists.{digest_of(storage.absolute(root))[:16]}",
        "prefect.resource.name": f"URL lists of {name}",
    }


def announced_uri(root: str, name: str) -> str:
    """Return where a watch keeps what it has said; each has its own, since several configs may share a store."""
    return storage.join(root, "source", "lists", f"announced-{digest_of(name)[:16]}.json")


def _announced(uri: str) -> str:
    try:
        return str(storage.read_json(uri)["fingerprint"])
    except NotFoundError:
        return ""
