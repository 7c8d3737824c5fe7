"""Every error a user can meet, with the exit code its command ends with.

A message names the argument, file or key at fault, says what was expected and what came,
and ends with the way out. The commands print the message alone; a traceback means a defect.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_MODEL = 4
EXIT_DIVERGED = 5
EXIT_RANK_LOST = 6
EXIT_PROCESS_LOST = 7
EXIT_INTERRUPTED_SAVED = 75  # EX_TEMPFAIL: run the same command again to continue
EXIT_INTERRUPTED = 130


class DlmOneError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = EXIT_USAGE


class ConfigError(DlmOneError, ValueError):
    """A configuration key or value that cannot be used."""


class UsageError(DlmOneError, ValueError):
    """An argument of a public function or command that cannot be used."""


class PromptError(UsageError):
    """A prompt that cannot be generated from: wrong type, not Unicode, or too long."""


class BackendUnavailableError(DlmOneError, RuntimeError):
    """A backend was forced that cannot run here; the message says why and what can."""


class DataError(DlmOneError, ValueError):
    """Data files that are missing, malformed or empty."""

    exit_code = EXIT_DATA


class ModelFileError(DlmOneError, ValueError):
    """A model folder, checkpoint or import that is missing, damaged or does not fit."""

    exit_code = EXIT_MODEL


class CheckpointError(ModelFileError):
    """A training checkpoint that cannot be read or written."""


class ModelNotLoadedError(DlmOneError, RuntimeError):
    """`generate` was called and no model was named, loaded or configured; or it was unloaded."""

    exit_code = EXIT_MODEL


class QueueFullError(DlmOneError, RuntimeError):
    """Too many calls wait for a model already; nothing was generated."""


class ForkedProcessError(DlmOneError, RuntimeError):
    """A model that had run before the process was forked is used in the child."""


class TokenizerMissingError(ModelFileError):
    """Text was given to a model folder that has no tokenizer."""


class DivergedError(DlmOneError, ArithmeticError):
    """Training met too many steps in a row that were not finite."""

    exit_code = EXIT_DIVERGED


class RankLostError(DlmOneError, RuntimeError):
    """Another process of a training run is gone, or did not answer in time."""

    exit_code = EXIT_RANK_LOST


class ServerLostError(DlmOneError, RuntimeError):
    """A process that the server cannot do without ended by itself."""

    exit_code = EXIT_PROCESS_LOST


class InterruptedAndSavedError(DlmOneError):
    """Training was asked to stop and has saved; the same command continues it."""

    exit_code = EXIT_INTERRUPTED_SAVED
