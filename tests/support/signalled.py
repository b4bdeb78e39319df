"""A command that gets a signal at a known moment: signalled WHERE NUMBER SIGNAL MODULE ...

WHERE: "module:function" or "module:Class.method", which gets the signal at its NUMBER-th call, or
"module", which gets it at its import. MODULE and what follows: a command, run as by python -m.
"""

import importlib
import os
import runpy
import signal
import sys
import time


class AtImport:
    """An import hook that finds nothing but sees the name of each imported module."""

    def __init__(self, name, send):
        self.name, self.send = name, send

    def find_spec(self, name, *_):
        if name == self.name:
            self.send()


def at_call(module, name, number, send):
    function, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            send()
        return function(*args, **kwargs)

    setattr(module, name, wrapper)


def main(where, number, name, *command):
    def send():
        print(f"signalled at {time.monotonic()}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, name))

    module, _, function = where.partition(":")
    if function:
        owner = importlib.import_module(module)
        *owners, function = function.split(".")
        for attribute in owners:
            owner = getattr(owner, attribute)
        at_call(owner, function, int(number), send)
    else:
        sys.meta_path.insert(0, AtImport(module, send))
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
