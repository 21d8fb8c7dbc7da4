"""The one exception family of optiq.

Every message is a single line that names the input, the limit it broke and the fix.
The command line prints it and exits with `exit_code`; `--debug` adds the traceback.
"""


class OptiqError(Exception):
    """Base of everything optiq raises on purpose."""

    exit_code = 1


class UsageError(OptiqError):
    """An option or argument that cannot be honoured."""

    exit_code = 2


class SourceError(OptiqError):
    """The model to convert cannot be found, read or understood."""


class ChatError(OptiqError):
    """A conversation that cannot be written as the model's chat template wants it."""


class CalibrationError(OptiqError):
    """The calibration rows are malformed, too few or cannot be rendered."""


class SensitivityError(OptiqError):
    """Scores are missing, not finite, or belong to another model."""


class CheckpointError(OptiqError):
    """Work in progress on disk is damaged, or belongs to another job."""


class BudgetError(OptiqError):
    """No plan satisfies the byte budget and the floors."""


class KVError(OptiqError):
    """A KV-cache configuration or a saved cache cannot be read, or does not fit the model."""


class AdapterError(OptiqError):
    """An adapter or the data of its training cannot be read, or does not fit the model."""


class DistributedError(OptiqError):
    """The ranks of a distributed run cannot be connected, or do not fit together."""


class ExportError(OptiqError):
    """The model could not be written, or what was written differs from the plan."""


class EvalError(OptiqError):
    """Evaluation data or records are missing, damaged, or belong to another run."""


class SandboxError(OptiqError):
    """A sandbox cannot do what it is asked for."""


class SandboxUnavailable(SandboxError):
    """The asked level of isolation cannot be had here; nothing was run."""


class ServeError(OptiqError):
    """The server cannot be started, or a request cannot be answered."""


class RequestError(ServeError):
    """A request that cannot be honoured; `param` names what is wrong with it, if one field is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLongError(RequestError):
    """A prompt that does not fit the model's context."""


class OverloadedError(ServeError):
    """No room for one more request now; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServeError):
    """A request was not answered in its time."""
