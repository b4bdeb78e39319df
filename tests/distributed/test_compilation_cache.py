"""Compiled programs on disk: another process reads them, and damaged ones do no harm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxflat.distributed import compilation_cache

PROGRAM = """
import jax, jax.numpy as jnp
from jaxflat.distributed import compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
compilation_cache.MIN_COMPILE_SECONDS = 0.0
folder = compilation_cache.enable()
value = jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 4))).sum()
print(folder, sum(hits), float(value).hex(), sep=",")
"""


@pytest.fixture
def run(tmp_path):
    def run(**environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        kept |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)} | environment
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folder, hits, value = done.stdout.strip().split(",")
        return folder, int(hits), value, done.stderr

    return run


@pytest.mark.skipif(
    "avx512" in compilation_cache.cpu_kind(), reason="JAX refuses its own cached programs"
)
@pytest.mark.slow
def test_the_next_process_reads_what_this_one_compiled(run, tmp_path):
    folder, hits, value, said = run()
    assert folder.startswith(f"{tmp_path}/jaxflat/programs-")
    assert (hits, said) == (0, "")
    again, hits, same, said = run()
    assert again == folder
    assert hits > 0
    assert same == value
    assert said == ""
    for file in Path(folder).iterdir():  # as if the process died while writing it
        file.write_bytes(file.read_bytes()[:-20])
    _, _, same, said = run()
    assert same == value
    assert "UserWarning: Error reading persistent compilation cache entry" in said


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"JAX_ENABLE_COMPILATION_CACHE": "0"}, "JAX_ENABLE_COMPILATION_CACHE=0"),
        ({"JAX_COMPILATION_CACHE_DIR": "FILE/programs"}, "FILE/programs cannot be written: Not a"),
    ],
)
def test_the_reason_why_nothing_is_cached_is_returned(run, tmp_path, environment, reason):
    file = tmp_path / "a file"
    file.write_text("")
    environment = {key: value.replace("FILE", str(file)) for key, value in environment.items()}
    expected = f"not cached: {reason.replace('FILE', str(file))}"
    assert run(**environment)[0].startswith(expected)


@pytest.mark.skipif("avx512" not in compilation_cache.cpu_kind(), reason="a CPU without AVX-512")
def test_a_cpu_with_avx512_is_the_reason(run):
    assert run()[0] == "not cached: JAX refuses cached programs on CPUs with AVX-512"


def test_another_kind_of_cpu_has_another_folder():
    kinds = ("x86_64 flags: avx2", "x86_64 flags: avx2 fma", "aarch64 Features: asimd")
    assert len({compilation_cache.default_folder(kind) for kind in kinds}) == 3
