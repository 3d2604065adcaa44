"""What the API says no with: an HTTP status, a stable code, a sentence, and when to come back."""

from __future__ import annotations

import math

from sfumato import checks
from sfumato.errors import SfumatoError

LONGEST_WAIT = 120  # seconds of Retry-After; the clients of OpenAI ignore longer ones


class Refused(SfumatoError):
    """Not done, and why. retry_after: seconds after which it may be."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after = None if retry_after is None else max(1, min(LONGEST_WAIT, math.ceil(retry_after)))


def not_found(what: str, name: object) -> Refused:
    """The same for what never was and for what is another's."""
    return Refused(404, "not_found", f"there is no {what} {checks.shown(str(name))}", param="id")


def bad(message: str, param: str | None = None) -> Refused:
    return Refused(400, "bad_input", message, param=param)


def file_gone(name: str, param: str | None = None) -> Refused:
    return bad(f"the file {checks.shown(name)} is not there, or not any more; send it to /v1/files", param)
