"""Every error a user can meet, as one tree.

UnclipError
|-- ConfigError      the config file or the command line is wrong              exit code 2
|-- InputError       data the user named is missing, unreadable or empty       exit code 1
|-- StorageError     the store cannot be reached, read or written              exit code 1
|   `-- NotFoundError    one object is not there
|-- ConflictError    another process was faster; nothing was changed           exit code 1
|-- IntegrityError   an artefact is not what its record says it is             exit code 1
|-- ShardError       one shard cannot be processed                             exit code 1
`-- StageError       a stage failed as a whole                                 exit code 1
    `-- StageTimeoutError    it took longer than the config allows

A message names the place, the value and the remedy, for example
``decoder.learning_rate: 'fast' is not a number; write for example 1.2e-4``.
"""

from __future__ import annotations


class UnclipError(Exception):
    """Base of all errors of the pipeline that are the user's to read; shown without a traceback."""

    exit_code = 1


class ConfigError(UnclipError):
    """A setting or a command-line argument is wrong; nothing has run."""

    exit_code = 2


class InputError(UnclipError):
    """Data named by the user is missing, unreadable or empty."""


class StorageError(UnclipError):
    """The store cannot be reached, read or written."""


class NotFoundError(StorageError):
    """The store has no object of that name."""


class ConflictError(UnclipError):
    """Another process has changed the same thing meanwhile; nothing was written."""


class IntegrityError(UnclipError):
    """An artefact differs from its record in size, checksum or row count."""


class ShardError(UnclipError):
    """One shard cannot be processed.

    Args:
        message: place, value and remedy.
        retryable: whether another attempt can succeed (a time-out can, a corrupt archive cannot).
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        """Keep ``retryable`` when the error crosses a process boundary."""
        return (_rebuild_shard_error, (str(self), self.retryable))


def _rebuild_shard_error(message: str, retryable: bool) -> ShardError:
    return ShardError(message, retryable=retryable)


class StageError(UnclipError):
    """A stage failed as a whole; what it committed is kept and the same command resumes it."""


class StageTimeoutError(StageError, TimeoutError):
    """One try of a stage took longer than the config allows."""


def first_line(error: BaseException) -> str:
    """Say in one line what an error of other software says in many; its type where it says nothing."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # Of a traceback that was put into a message, what counts is at its end.
    return f"{lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
