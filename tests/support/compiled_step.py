"""Print the memory and communication of a compiled training step, without running it.

    python tests/support/compiled_step.py --config=FILE.py:SCALE [--point=0] [--devices=8]

The CPU simulates the devices. Figures are in MiB per device: the arguments (state, language), the
further memory of the step, and the sizes of the arrays that devices exchange.
"""

import argparse
import math
import os
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

MIB = 2**20
COLLECTIVE = r"= \(?(\w\d+)\[([\d,]*)\].* (all-reduce|all-gather|reduce-scatter|all-to-all)\("
BYTES = {"f32": 4, "s32": 4, "u32": 4, "f16": 2}


def compiled_step(config: Any) -> Any:
    """Return the compiled steps of a resolved config's first phase, made from shapes."""
    import jax
    import jax.numpy as jnp

    from jaxflat.distributed import sharding
    from jaxflat.languages.batches import Source
    from jaxflat.languages.sentences import Sentences
    from jaxflat.runs import builders, trajectory
    from jaxflat.runs.languages import make_language

    phase = trajectory.phases(config)[0]
    mesh = builders.make_mesh(config)
    params = jax.eval_shape(lambda: builders.init_params(config))
    state = jax.eval_shape(partial(builders.init_state, phase=phase), params)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        *(state, builders.state_shardings(mesh, state)),
    )
    language, size, stored = make_language(config.language), phase.settings.batch_size, None
    if config.language.stored_sentences:  # of one step
        words_1xBxT = jnp.zeros((1, size, language.max_length), jnp.int32)
        stored = Sentences(words_1xBxT, jnp.zeros((1, size), jnp.int32), None)
    source = Source(language, stored)
    schedule = builders.schedule(phase.settings, anneal=False)
    arguments = sharding.replicate(mesh, (source, jax.random.key(0), schedule))
    steps = builders.train_steps(config, phase.settings, mesh)
    return steps.lower(state, *arguments, phase.start, phase.stop).compile()


def exchanged(compiled: Any) -> Counter[str]:
    """Return the bytes that come out of each kind of collective operation, on one device."""
    found: Counter[str] = Counter()
    for dtype, shape, kind in re.findall(COLLECTIVE, compiled.as_text()):
        found[kind] += BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
    return found


def main() -> None:
    """Print the figures of a point of a sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--point", type=int, default=0)
    parser.add_argument("--devices", type=int, default=8)
    flags, rest = parser.parse_known_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={flags.devices}"

    from jaxflat.config import loading
    from jaxflat.runs import builders
    from jaxflat.sweeps import points

    overrides = loading.parse_overrides(rest)
    config, listed = loading.load(flags.config)
    config, listed = loading.override(config, overrides), loading.without_keys(listed, overrides)
    config = points.expand(config, listed, Path())[flags.point].config
    compiled = compiled_step(config)
    memory = compiled.memory_analysis()
    print(f"{builders.num_params(config):,} parameters, {flags.devices} devices; MiB on one:")
    figures = {"arguments": memory.argument_size_in_bytes, "besides": memory.temp_size_in_bytes}
    for name, size in (figures | exchanged(compiled)).items():
        print(f"{name:15}{size / MIB:12,.1f}")


if __name__ == "__main__":
    sys.exit(main())
