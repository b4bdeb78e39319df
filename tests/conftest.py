"""Strict tests: eight CPU devices, no silent dtype promotion, no silent rank promotion."""

import gc
import os
from pathlib import Path

import jaxlib

# Processes that tests start import tests.support, as tests do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Most tests compile for longer than they run. The older emitters compile in a third of the time;
# programs that are not split into parts for several threads, in a fifth less, as every core has a
# worker. Later versions may not have these flags, and stop at a flag they do not know.
if jaxlib.version.__version_info__[:2] == (0, 10):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["MPLBACKEND"] = "agg"
os.environ.pop("KUBERNETES_SERVICE_HOST", None)  # a pod that runs tests is no cluster
# All test workers and processes share one cache of compiled programs, also with the next run. If a
# file is half written, for example after a kill, JAX warns and compiles (see pyproject.toml).
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{Path(__file__).parents[1]}/.pytest_cache/programs"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

gc.set_threshold(200_000, 20, 20)  # tracing makes many objects that live on: a fifth of the time
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def no_more_compiled_code_than_one_module_needs():
    """Every compiled function takes memory maps, and Linux allows a process 65,530 of them."""
    yield
    jax.clear_caches()


@pytest.fixture
def fully_optimized():
    """Programs run as fast as users' do, and merge collectives; they compile for longer."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
