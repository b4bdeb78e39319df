"""Cache compiled XLA programs on disk, so that the next run does not compile them again."""

import hashlib
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax

MIN_COMPILE_SECONDS = 0.1  # programs that compile faster are not cached


def enable() -> str:
    """Let JAX cache the programs that it compiles from now on; return where, or why not.

    The folder is $JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder for this kind of
    CPU. A program compiled for another kind may crash at an unknown instruction. Nothing is cached
    if JAX_ENABLE_COMPILATION_CACHE=0, if the folder cannot be written, or on CPUs with AVX-512.
    On these, JAX refuses its own cached programs, with a long line about each (issue 38445 of
    github.com/jax-ml/jax).

    Call it after `jax.distributed.initialize`: it asks JAX for the devices.
    """
    settings: Any = jax.config  # JAX defines its attributes at run time
    chosen = settings.jax_compilation_cache_dir
    if not settings.jax_enable_compilation_cache:
        return "not cached: JAX_ENABLE_COMPILATION_CACHE=0"
    kind = cpu_kind()
    if not chosen and jax.default_backend() == "cpu" and "avx512" in kind:
        return "not cached: JAX refuses cached programs on CPUs with AVX-512"
    folder = Path(chosen) if chosen else default_folder(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:  # for example in a read-only home
        settings.update("jax_enable_compilation_cache", False)
        return f"not cached: {folder} cannot be written: {error.strerror}"
    settings.update("jax_compilation_cache_dir", str(folder))
    settings.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return str(folder)


def default_folder(kind: str) -> Path:
    """Return the cache's folder for a kind of CPU, in the user's cache folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(kind.encode()).hexdigest()[:8]
    return caches / "jaxflat" / f"programs-{digest}"


def cpu_kind() -> str:
    """Return the CPU's architecture, and on Linux its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"
