"""The seconds of compilation, from JAX's events."""

import jax
import jax.numpy as jnp
import pytest

from jaxflat.distributed import compilation_time
from jaxflat.distributed.compilation_time import Watch


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(compilation_time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(compilation_time, "_spans", [])
    return now


def test_what_is_traced_within_another_function_counts_once(clock):
    watch = Watch()
    for end, seconds, kind in (
        *((3.0, 1.0, "jaxpr_trace"), (5.0, 1.0, "jaxpr_trace"), (6.0, 5.0, "jaxpr_trace")),
        (10.0, 3.0, "backend_compile"),
    ):
        clock[0] = end
        compilation_time._record(f"/jax/core/compile/{kind}_duration", seconds)
    compilation_time._record("/jax/compilation_cache/cache_retrieval_time_sec", 1.0)
    assert watch.read() == (10.0, 5.0 + 3.0)


def test_a_new_program_compiles_and_a_known_one_does_not():
    program, spent = jax.jit(lambda x: jnp.sin(x) @ x.T), []
    for _ in range(2):
        watch = Watch()
        program(jnp.ones((8, 4))).block_until_ready()
        spent.append(watch.read())
    (seconds, compiling), (_, again) = spent
    assert 0 < compiling <= seconds
    assert again == 0
