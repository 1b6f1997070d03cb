"""Every decision about production as an artifact in Prefect, so that it can be looked up where the runs are.

The registry in the store decides and remembers; this shows it, and nothing depends on its being shown.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flows.prefect_server import ServerError, prefect_api, user_api_url
from flows.run_notes import rules_table
from stages.redaction import hide_secrets

if TYPE_CHECKING:
    from stages.gate import Decision

logger = logging.getLogger(__name__)

FLOW_NAME = "unclip-production"
KEY = "promotion"
_NUM_CHANGES = 10


def in_words(number: int | None) -> str:
    """Name what is in production."""
    return f"version {number}" if number else "nothing"


def refusal(number: int, production: int | None) -> str:
    """Say that the gate has refused a version, and what is in production."""
    return f"version {number} is registered, not promoted; in production is still {in_words(production)}"


def publish_note(root: str, said: str, decision: Decision | None) -> None:
    """Create the artifact of the flow run in which this is called: what was decided and why, and the last changes.

    Args:
        root: the store with the registry.
        said: how the decision ended, in a line.
        decision: what the gate said; None where it was not asked.
    """
    from prefect.artifacts import create_markdown_artifact

    text = hide_secrets(note(root, said, decision))
    create_markdown_artifact(text, key=KEY, description=hide_secrets(f"Production of {root}: {said}"))


def tell_server(root: str, said: str, decision: Decision | None) -> None:
    """Create the artifact in a flow run of its own on the user's server, if any; one that is down is a warning.

    Args:
        root: the store with the registry.
        said: how the decision ended, in a line.
        decision: what the gate said; None where it was not asked.
    """
    if not user_api_url():
        return
    from prefect import flow

    @flow(name=FLOW_NAME, flow_run_name=lambda: hide_secrets(said), persist_result=False)
    def decided() -> None:
        publish_note(root, said, decision)

    try:
        with prefect_api(None):
            decided()
    except ServerError as error:
        logger.warning("%s; the decision stands, but is not shown there", error)


def note(root: str, said: str, decision: Decision | None) -> str:
    """Write what ``publish_note`` shows, in markdown."""
    from stages.registry import read_production

    parts = [f"**{said}** (`{root}`)"]
    if decision is not None:
        parts.append(rules_table(decision) if decision.rules else "No rule is set (section `gate`).")
    if changes := read_production(root).history[-_NUM_CHANGES:]:
        lines = [f"- {change.at} {change}" for change in reversed(changes)]
        parts.append("\n".join(["Changes of production, the last one first:", "", *lines]))
    return "\n\n".join(parts)
