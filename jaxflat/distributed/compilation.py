"""Compiled programs, kept on disk from one run to the next."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

SECONDS = 0.1  # what compiles in less is compiled again


def keep_programs() -> Path | None:
    """Have JAX keep what it compiles from now on; return the folder, or None where it cannot.

    The folder is $JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder for this kind of
    CPU: a program made for another one may stop at an instruction that is not there. On CPUs with
    AVX-512 JAX refuses what it has kept, with a long line for each program (issue 38445 of
    github.com/jax-ml/jax): nothing is kept for them. JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing
    anywhere. Call it after `jax.distributed.initialize`: it asks for the devices.
    """
    settings: Any = jax.config  # whose attributes are made at run time
    chosen = settings.jax_compilation_cache_dir
    if not settings.jax_enable_compilation_cache:
        return None
    kind = kind_of_cpu()
    if not chosen and jax.default_backend() == "cpu" and "avx512" in kind:
        return None
    folder = Path(chosen) if chosen else default_folder(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # such as a home that cannot be written
        settings.update("jax_enable_compilation_cache", False)
        return None
    settings.update("jax_compilation_cache_dir", str(folder))
    settings.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    return folder


def default_folder(kind: str) -> Path:
    """Return where programs are kept, in the user's cache folder, for a kind of CPU."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(kind.encode()).hexdigest()[:8]
    return caches / "jaxflat" / f"programs-{digest}"


def kind_of_cpu() -> str:
    """Return the CPU's architecture, and on Linux the instructions it knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"
