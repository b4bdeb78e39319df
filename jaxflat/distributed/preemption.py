"""A signal to stop: obeyed at once, or between compiled calls where there is work to save."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxflat.distributed import ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 0.2  # seconds; `timeout` signals a process and then its group: one request that comes twice

Keep = Callable[[str, Callable[[], Any]], Any]
"""keep(name, make) -> what make() returns, or what it returned before a signal came."""


class Preempted(SystemExit):
    """The process was asked to stop; what was done so far is on disk.

    Where nothing catches it, Python ends with exit code 75 and without a traceback.
    """

    code = 75


_received: list[int] = []
_at_once = True
_answered = threading.Event()


def install() -> None:
    """From now on SIGTERM and SIGINT raise Preempted, within `deferred` at the next `check`.

    A second one ends the process at once.
    Python runs handlers in its main thread and not before a compiled call returns, so a thread
    answers meanwhile: it gets the signals' numbers through a pipe.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in SIGNALS:
        signal.signal(number, _remember)
    threading.Thread(target=_answer, args=(reading,), daemon=True).start()


def requested() -> bool:
    """Say whether a signal has come, to any of the run's processes: all must ask as often."""
    return any(ranks.gather(bool(_received), "preemption"))


def check(save: Callable[[], Any] | None = None) -> None:
    """Save and raise Preempted where a signal has come: between compiled calls."""
    if requested():
        if save is not None:
            save()
        own = [signal.Signals(number).name for number in _received]
        raise Preempted(own[0] if own else "a signal to another process")


@contextmanager
def deferred() -> Iterator[None]:
    """Leave it to `check` to stop what is within: it saves the work first."""
    global _at_once
    _at_once = False
    try:
        yield
    finally:
        _at_once = True
    check()


def afresh(name: str, make: Callable[[], Any]) -> Any:
    """Keep nothing."""
    return make()


def _remember(number: int, _: Any) -> None:
    _received.append(number)
    if _at_once and len(_received) == 1:
        _answered.wait(timeout=1)
        raise Preempted(signal.Signals(number).name)


def _answer(reading: int) -> None:
    """Say that a signal has come; end the process where another does."""
    came = None
    while True:
        number = os.read(reading, 1)[0]
        if number not in SIGNALS:  # someone else's
            continue
        if came is None:
            came = time.monotonic()
            name = signal.Signals(number).name
            text = f"{name}: stopping after the current call or compilation; once more ends at once"
            print(text, file=sys.stderr, flush=True)
            _answered.set()
        elif time.monotonic() - came > ECHO:
            os._exit(128 + number)
