"""A signal to stop: remembered when it comes, acted on where the work can be saved."""

import signal
import sys
from typing import Any


class Preempted(Exception):
    """The process was asked to stop; what was done so far is on disk."""


_received: list[int] = []


def install() -> None:
    """Remember SIGTERM and SIGINT from now on; a second one ends the process at once."""

    def handle(number: int, _: Any) -> None:
        _received.append(number)
        name = signal.Signals(number).name
        print(f"{name}: saving after the current call; once more ends at once", file=sys.stderr)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def requested() -> bool:
    """Say whether a signal has come."""
    return bool(_received)


def check() -> None:
    """Raise Preempted where a signal has come."""
    if _received:
        raise Preempted(signal.Signals(_received[0]).name)
