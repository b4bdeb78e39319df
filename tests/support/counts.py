"""How many cases and trials the tests take: a covering part of them, or all in `make full`."""

import os

FULL = os.environ.get("JAXFLAT_FULL") == "1"
FAULT_TRIALS = 60 if FULL else 3


def in_full(*cases):
    """Return these further cases of a test in `make full`, and none otherwise."""
    return cases if FULL else ()
