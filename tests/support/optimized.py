"""Compile with XLA's optimizations, which conftest.py switches off."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def optimized() -> Iterator[None]:
    """Optimize what is compiled within the block: for what runs longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
