"""Errors that a user can act on: the message names the setting, file or line, and the remedy."""


class TrainError(ValueError):
    """Base of the errors below; the command prints it as one line."""


class ConfigError(TrainError):
    """A setting out of its range."""


class BaseError(TrainError):
    """The base model cannot be loaded."""


class ResumeError(TrainError):
    """A run that cannot be gone on with as asked."""


class DataError(TrainError):
    """A data set that cannot be used."""


class AllocationError(TrainError):
    """An allocation that cannot be used."""


class OutOfMemoryError(TrainError):
    """Memory did not suffice; the message says what to lower."""


class OutputError(TrainError):
    """A file that cannot be written, because a disk is full for example."""


class DivergedError(TrainError):
    """Training left the finite numbers."""
