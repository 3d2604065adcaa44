"""The worker process: `python -m sfumato.serve.worker FD`, a socket whose other end the front has.

It ends when the front does, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys

from sfumato.serve.wire import Broken, Line
from sfumato.serve.worker.worker import Worker, told

PR_SET_PDEATHSIG = 1


def die_with_the_front() -> None:
    """On Linux the kernel ends this process when the one that started it ends."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(descriptor: int) -> int:
    for each in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the front decides when this ends
        signal.signal(each, signal.SIG_IGN)
    die_with_the_front()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    line = Line(socket.socket(fileno=descriptor))
    try:
        start, _ = line.receive()
        try:
            worker = Worker(line, start)
        except Exception as error:
            line.send({"is": "unable", "error": told(error)})
            return 1
        worker.hear(line)
    except Broken:
        pass
    os._exit(0)  # threads may be drawing for nobody


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
