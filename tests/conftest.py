"""Strict tests: eight CPU devices, no silent dtype promotion, no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["MPLBACKEND"] = "agg"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most tests compile for longer than they run.
jax.config.update("jax_disable_most_optimizations", True)
