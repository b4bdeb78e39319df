"""A signal to stop: remembered when it comes, acted on where the work can be saved."""

import signal
import sys
from typing import Any

from jaxflat import hosts


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
    """Say whether a signal has come, to any of the run's processes: all must ask as often."""
    return any(hosts.gather(bool(_received), "preemption"))


def check() -> None:
    """Raise Preempted where a signal has come."""
    if requested():
        own = [signal.Signals(number).name for number in _received]
        raise Preempted(own[0] if own else "a signal to another process")
