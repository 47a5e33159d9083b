"""What the user did wrong, in one line, and how to mend it.

Every error that a user can cause derives from `StrataError`; the command line prints its message
and exits non-zero, never with a traceback. The message says what was given, what is allowed and
what to do. Broken invariants of our own code stay `assert`.
"""

from __future__ import annotations

from typing import Literal

GO_ON = 75  # exit code (EX_TEMPFAIL) where nothing failed and the same command goes on


class StrataError(ValueError):
    """Wrong input from a user; its text is one line that says what to do.

    Attributes:
        exit_code: what the command line ends with: 2 for wrong input, 1 where the input was right
            and the work failed.
        told_by: where several processes train together, whose message it is: "main" if all of them
            have it, "all" if this process alone knows, "launcher" if that sees it itself.
    """

    exit_code = 2
    told_by: Literal["main", "all", "launcher", None] = None


class ConfigError(StrataError):
    """A recipe, an override or an argument is not valid."""


class DataError(StrataError):
    """A source file, a token shard or a tokenizer cannot be read."""


class CheckpointError(StrataError):
    """A training checkpoint is missing, damaged or belongs to another recipe."""


class ModelError(StrataError):
    """A model folder or a host architecture cannot be used."""


class BankError(StrataError):
    """A bank is missing, damaged, being written, or belongs to another model."""


class StorageError(StrataError):
    """The disk is full, or a folder cannot be written."""

    exit_code = 1


class LaunchError(StrataError):
    """The scheduler does not answer or refused a job, or processes could not find each other."""

    exit_code = 1


class DivergenceError(StrataError):
    """The loss or a gradient stopped being a number."""

    exit_code = 1


class HubError(StrataError):
    """The Hugging Face hub cannot be reached, or does not give what was asked for."""

    exit_code = 1


class WorkerError(StrataError):
    """A process that strata had started ended by itself."""

    exit_code = 1
