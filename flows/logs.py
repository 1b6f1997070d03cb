"""Log lines: on a terminal only what needs attention, elsewhere one structured line per event, with its stage."""

from __future__ import annotations

import contextvars
import logging
import os
import time

from rich.console import Console
from rich.text import Text

from stages.redaction import hide_secrets

PACKAGES = ("flows", "stages", "cluster", "unclip_models")
# Which stage the current thread works for; log lines from shared code name it.
CURRENT_STAGE: contextvars.ContextVar[str] = contextvars.ContextVar("stage", default="")


class Formatter(logging.Formatter):
    """``2026-11-24T06:31:48Z INFO stage=filter shard=3 message``; stage and shard only where they are known."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        places = {"stage": getattr(record, "stage", "") or CURRENT_STAGE.get(), "shard": getattr(record, "shard", "")}
        fields = [self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ"), record.levelname]
        fields += [f"{name}={value}" for name, value in places.items() if value != ""]
        text = " ".join([*fields, record.getMessage()])
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return hide_secrets(text)


class HidingFormatter(logging.Formatter):
    """Writes a record as another formatter does, without the secrets.

    Args:
        inner: the other one; ``None`` for the plain message.
    """

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        return hide_secrets(self._inner.format(record))


def hide_secrets_from_prefect() -> None:
    """Make every handler that sends lines to Prefect's API leave the secrets out, Prefect's own accounts included."""
    from prefect.logging.handlers import APILogHandler

    known = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    for handler in {handler for found in known for handler in found.handlers}:
        if isinstance(handler, APILogHandler) and not isinstance(handler.formatter, HidingFormatter):
            handler.setFormatter(HidingFormatter(handler.formatter))


class ConsoleHandler(logging.Handler):
    """Prints above the live bars instead of through them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a line is never wrapped or cut where it goes to a file."""
        try:
            text = Text(self.format(record), style=_style(record.levelno) if self._console.is_terminal else "")
            self._console.print(text, soft_wrap=True, highlight=False)
        except Exception:
            self.handleError(record)


def configure_logging(console: Console, *, debug: bool) -> None:
    """Send log lines to a console, and keep other libraries to their warnings.

    Args:
        console: the terminal or file.
        debug: show everything of ours, and Prefect's own lines with their tracebacks.
    """
    # Before Prefect is imported: it attaches its API handler to these loggers, so a run's page shows our lines.
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", ",".join(PACKAGES))
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    # Its client reports its use to its makers, and prints a notice about that, unless told not to.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    handler = ConsoleHandler(console)
    if not debug:
        handler.addFilter(_is_ours_to_show)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    level = logging.DEBUG if debug else logging.WARNING if console.is_terminal else logging.INFO
    handler.setLevel(level)
    for package in PACKAGES:
        # What the terminal does not show is still kept in the log of the run.
        logging.getLogger(package).setLevel(min(level, logging.INFO))


def _is_ours_to_show(record: logging.LogRecord) -> bool:
    """Drop Prefect's account of runs (failures with tracebacks): we say the same in one line."""
    return not record.name.startswith(("prefect.flow_runs", "prefect.task_runs")) and (
        record.levelno >= logging.WARNING or not record.name.startswith("prefect")
    )


def _style(level: int) -> str:
    return "red" if level >= logging.ERROR else "yellow" if level >= logging.WARNING else "dim"
