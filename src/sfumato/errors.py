"""The one tree of errors a user can meet.

Every message is a sentence that says what was wrong, with which argument, and what would be right. The command line
prints it as one line and exits with `exit_code`; nothing below ever shows a traceback for bad input.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SfumatoError(Exception):
    """Something failed. `code` is stable and meant for programs; `exit_code` is the command line's."""

    code = "failed"
    exit_code = 1


class InputError(SfumatoError):
    """What the caller gave cannot be used: a request, an argument, a recipe."""

    code = "bad_input"
    exit_code = 2

    def __init__(self, message: str, *, argument: str | None = None):
        super().__init__(message)
        self.argument = argument


class CheckpointError(InputError):
    """A weights file or model folder is damaged, incomplete, unsafe or of another kind."""

    code = "bad_checkpoint"


class DataError(InputError):
    """A folder of pictures or one of its members cannot be used."""

    code = "bad_data"


class StaleCacheError(DataError):
    """Cached latents were made from other pictures, another crop or another autoencoder."""

    code = "stale_cache"


class NonFiniteError(SfumatoError):
    """A network gave NaN or infinity. `layer` is its layer's name as in the weights' file, "" where it is not known."""

    code = "not_finite"

    def __init__(self, message: str, layer: str = ""):
        super().__init__(message)
        self.layer = layer


class Cancelled(SfumatoError):
    """The user asked to stop; nothing half-written stays behind."""

    code = "cancelled"
    exit_code = 130


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Bad input that is found inside, and names no argument itself, is of this one."""
    try:
        yield
    except InputError as error:
        error.argument = error.argument or argument
        raise
