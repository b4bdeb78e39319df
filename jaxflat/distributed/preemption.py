"""Stop on SIGTERM or SIGINT (Ctrl-C): immediately, or between compiled calls to save work.

Code that has work to save runs under `defer_signals` and calls `stop_if_requested` between compiled
calls. Everywhere else a signal stops the process immediately. The received signals are global,
because the system sends a signal to the whole process and its handler has no arguments of ours.
"""

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
# Seconds within which a second signal counts as the same request: `timeout` signals a process, then
# its process group.
REPEAT_WINDOW = 0.2


class Preempted(SystemExit):
    """The process was asked to stop; all finished work is on disk.

    If nothing catches it, Python exits with code 75 and prints no traceback.
    """

    code = 75


_received: list[int] = []
_deferred = False
_announced = threading.Event()


def install_handlers() -> None:
    """Let SIGTERM and SIGINT raise Preempted; under `defer_signals` the next check raises it.

    A second signal ends the process immediately.
    Python runs signal handlers in the main thread, and only after a compiled call returns. A thread
    therefore announces the signal meanwhile: it gets the signals' numbers through a pipe.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in SIGNALS:
        signal.signal(number, _handle)
    threading.Thread(target=_announce, args=(reading,), daemon=True).start()


def stop_requested() -> bool:
    """Say whether any process of the run got a signal. All processes must call it equally often."""
    return any(ranks.all_gather(bool(_received), "preemption"))


def stop_if_requested(save: Callable[[], Any] | None = None) -> None:
    """Call `save` and raise Preempted if any process of the run got a signal."""
    if stop_requested():
        if save is not None:
            save()
        own = [signal.Signals(number).name for number in _received]
        raise Preempted(own[0] if own else "a signal to another process")


@contextmanager
def defer_signals() -> Iterator[None]:
    """Within the block a signal waits: only `stop_if_requested` raises Preempted, after saving."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    stop_if_requested()


def _handle(number: int, _: Any) -> None:
    _received.append(number)
    if not _deferred and len(_received) == 1:
        _announced.wait(timeout=1)
        raise Preempted(signal.Signals(number).name)


def _announce(reading: int) -> None:
    """Print that the first signal arrived; end the process at the second."""
    first_at = None
    while True:
        number = os.read(reading, 1)[0]
        if number not in SIGNALS:  # another library handles it
            continue
        if first_at is None:
            first_at = time.monotonic()
            name = signal.Signals(number).name
            text = (
                f"{name}: stopping after the current call or compilation. "
                "Send it again to stop immediately."
            )
            print(text, file=sys.stderr, flush=True)
            _announced.set()
        elif time.monotonic() - first_at > REPEAT_WINDOW:
            os._exit(128 + number)
