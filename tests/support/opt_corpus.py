"""Write sentences of a random teacher of OPT's shape, and print the peak memory.

python -m tests.support.opt_corpus LAYERS SENTENCES DIRECTORY
"""

import dataclasses
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxflat.datasets.record_bytes import layout_of
from jaxflat.datasets.shards import write_shard
from jaxflat.languages.generated.language import Generated
from jaxflat.models.causal import CausalTransformer, empty_cache
from jaxflat.runs.corpus import column_types, columns_of

NUM_WORDS, LENGTH = 2000, 24


def opt_language(num_layers: int) -> Generated:
    """Return the language of a model of width 768, like OPT-125M; its parameters are shapes."""
    model = CausalTransformer(
        num_tokens=50_272,
        max_length=2048,
        width=768,
        num_layers=num_layers,
        num_heads=12,
        mlp_width=3072,
        activation="relu",
    )
    words = jnp.zeros((1, 1), jnp.int32)
    initialize = partial(model.init, method="next_logits")
    params = jax.eval_shape(initialize, jax.random.key(0), words)["params"]
    return Generated(
        params=params,
        kept_V=jnp.arange(4, 4 + NUM_WORDS, dtype=jnp.int32),
        tasks={},
        model=model,
        empty_cache=empty_cache,
        first_token=2,
        stop_token=2,
        min_length=4,
        max_length=LENGTH,
        max_candidates=65_536,
    )


def with_random_params(language: Generated) -> Generated:
    """Return the language with parameters in place of their shapes."""
    words = jnp.zeros((1, 1), jnp.int32)
    initialize = jax.jit(partial(language.model.init, method="next_logits"))
    params = initialize(jax.random.key(0), words)["params"]
    return dataclasses.replace(language, params=params)


def main() -> None:
    num_layers, num_sentences, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    language = with_random_params(opt_language(num_layers))
    layout = layout_of(column_types(language, (), False))
    start = time.perf_counter()
    size = num_sentences
    parts = columns_of(language, jax.random.key(1), size, (), False, num_sentences=size)
    write_shard(directory / "shard.array_record", layout, parts)
    seconds = time.perf_counter() - start
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"gibibytes": gibibytes, "seconds": seconds}))


if __name__ == "__main__":
    main()
