"""Measure how long this process traces, lowers and compiles programs, by JAX's own events."""

import threading
from time import perf_counter

import jax

_spans: list[tuple[float, float]] = []  # (start, end) by perf_counter, disjoint and in order
_lock = threading.Lock()


class Watch:
    """A clock that starts now, and knows how much of its time went into compilation."""

    def __init__(self) -> None:
        self._start, self._compiling = perf_counter(), compile_seconds()

    def read(self) -> tuple[float, float]:
        """Return the seconds since the start, and how many of them went into compilation."""
        return perf_counter() - self._start, compile_seconds() - self._compiling


def compile_seconds() -> float:
    """Return the seconds that this process has spent on tracing, lowering and compiling."""
    return sum(end - start for start, end in _spans)


def _record(event: str, duration_secs: float, **_: object) -> None:
    """Add an event's time. A function traced within another ends first, so the outer replaces it.

    JAX reports an event when it ends.
    """
    if event.startswith("/jax/core/compile/"):
        end = perf_counter()
        start = end - duration_secs
        with _lock:  # several threads may compile
            while _spans and _spans[-1][1] > start:
                start = min(start, _spans.pop()[0])
            _spans.append((start, end))


jax.monitoring.register_event_duration_secs_listener(_record)
