"""Measuring in processes of their own: what one has loaded or holds does not show in the next."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def medians(function: Callable[..., tuple[float, ...]], *arguments: Any, repetitions: int) -> list[float]:
    """Call a function several times, each in a new process; return the medians of the numbers that it returns."""
    context = multiprocessing.get_context("spawn")
    found = []
    for _ in range(repetitions):
        ours, theirs = context.Pipe()
        process = context.Process(target=_send, args=(theirs, function, arguments))
        process.start()
        theirs.close()
        found.append(ours.recv())
        process.join()
    return [statistics.median(column) for column in zip(*found, strict=True)]


def _send(connection: Connection, function: Callable[..., tuple[float, ...]], arguments: tuple[Any, ...]) -> None:
    connection.send(function(*arguments))
