"""Messages in the words of the door by which a request came: options of the command line, fields of another API.

A message calls a field of a request by its own name: at its beginning, where that field is what is wrong (`argument` of
its error), and elsewhere in backticks, as `hires.scale`. Values are written as JSON has them (`checks.shown`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

_NAMED = re.compile(r"`([a-z_]+(?:\.[a-z_]+)?)`")


def worded(message: str, argument: str | None, word: Callable[[str], str | None]) -> str:
    """A message with the words of a door. word: what that calls a field; None where it has no word of its own."""
    own, head = None if argument is None else word(argument), ""
    if own is not None and re.match(rf"{re.escape(argument or '')}[ ']", message):
        head, message = own, message.removeprefix(argument or "")
    return head + _NAMED.sub(lambda found: word(found[1]) or found[0], message)
