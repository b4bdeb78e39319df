"""A signal to stop: obeyed at once where nothing would be lost, else where the work is saved."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 0.2  # seconds; `timeout` signals a process and then its group: one request that comes twice


class Preempted(SystemExit):
    """The process was asked to stop; what was done so far is on disk.

    Where nothing catches it, Python ends with exit code 75 and without a traceback.
    """

    code = 75


_received: list[int] = []
_agreed: list[bool] = []
_at_once = True
_answered = threading.Event()


def install() -> None:
    """From now on SIGTERM and SIGINT raise Preempted; within `deferred` only `check` does.

    A second one ends the process. Python handles signals between two bytecodes of the main thread,
    so not during a compiled call: a thread reads their numbers from a pipe and answers meanwhile.
    """
    # jax.distributed would take SIGTERM for itself.
    os.environ.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "false")
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in SIGNALS:
        signal.signal(number, _handle)
    threading.Thread(target=_answer, args=(reading,), daemon=True).start()


@contextmanager
def deferred() -> Iterator[None]:
    """Leave it to `check` to stop what is within, which saves its work first."""
    global _at_once
    _at_once = False
    try:
        yield
    finally:
        _at_once = True
    check()


def requested() -> bool:
    """Say whether a signal has come.

    With several processes (jax.distributed) the answer is the same in all: whether one has come to
    any of them. Each of them must then ask as often as the others, from its main thread.
    """
    import jax  # late: a signal counts from before JAX is there

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return bool(_received)
    if not _agreed:
        from jax.experimental import multihost_utils

        if multihost_utils.process_allgather(bool(_received)).any():
            _agreed.append(True)
    return bool(_agreed)


def check() -> None:
    """Raise Preempted where a signal has come."""
    if requested():
        raise Preempted(_name(_received[0]) if _received else "a signal to another process")


def _handle(number: int, _: Any) -> None:
    _received.append(number)
    if _at_once and len(_received) == 1:
        _answered.wait(timeout=1)
        raise Preempted(_name(number))


def _answer(reading: int) -> None:
    """Say that a signal has come; at the next one end the process."""
    came = None
    while True:
        number = os.read(reading, 1)[0]
        if number not in SIGNALS:  # someone else's
            continue
        if came is None:
            came = time.monotonic()
            text = f"{_name(number)}: stopping after the current call; once more ends at once"
            print(text, file=sys.stderr, flush=True)
            _answered.set()
        elif time.monotonic() - came > ECHO:
            os._exit(128 + number)


def _name(number: int) -> str:
    return signal.Signals(number).name
