"""Functions called at the same time, each in its own thread."""

import threading
from collections.abc import Callable, Sequence


def call_concurrently(functions: Sequence[Callable[[], object]]) -> None:
    """Call each function in its own thread, all at the same time; raise their first error."""
    barrier, errors = threading.Barrier(len(functions)), []

    def call(function):
        try:
            barrier.wait(30)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
