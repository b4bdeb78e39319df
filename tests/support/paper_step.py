"""Train three steps of a model of the scale `paper`, and take one sample of its Hessian trace.

    python -m tests.support.paper_step --config=model_size_sweep --width=1536

Steps have 8 sentences, computed one by one with recomputed activations; all else is as shipped. The
text of `generated_text` needs a teacher. A hidden Markov model with as many words of the same
length takes its place. Prints a JSON line: parameters, losses and the sample of the trace in nats,
seconds of each (compiling included), and the peak of the process's memory in GiB.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
NUM_STEPS, KIB, GIB = 3, 2**10, 2**30


def paper_configs(name: str) -> list[Any]:
    """Return the configs of the points that train a model, of a shipped file at scale `paper`."""
    from jaxflat.config import loading
    from jaxflat.sweeps import points

    config, listed = loading.load(f"{CONFIGS}/{name}.py:paper")
    if config.language.name == "generated":
        sizes = {"num_words": config.language.generated.num_words, "min_length": 1}
        sizes["length"] = config.language.generated.length
        config.language.update({"name": "hmm", "stored_sentences": 0, "hmm": sizes})
    config.phases[config.phase_order[0]].update({"batch_size": 8, "microbatch_size": 1})
    config.training.remat, config.flatness.microbatch_size = True, 1
    expanded = points.expand(config, listed, Path("unused"))
    return [point.config for point in expanded if point.config.phase_order]


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Return what a function returns once it is computed, and the seconds that it took."""
    import jax

    start = time.monotonic()
    result = jax.block_until_ready(function(*args))
    return result, round(time.monotonic() - start, 1)


def train(config: Any) -> tuple[Any, list[float]]:
    """Return the parameters after the first steps of a point, and the loss before each."""
    import jax

    from jaxflat.languages.batches import Source
    from jaxflat.runs import builders, recovery, trajectory
    from jaxflat.runs.languages import make_language

    phase, mesh = trajectory.phases(config)[0], builders.make_mesh(config)
    state = recovery.fresh_state(config, builders.init_params(config, mesh), phase)
    steps = builders.train_steps(config, phase.settings, mesh)
    source = Source(make_language(config.language))
    schedule = builders.schedule(phase.settings, anneal=False)
    losses = []
    for stop in range(1, NUM_STEPS + 1):
        state, loss = steps(state, source, jax.random.key(0), schedule, 0, stop)
        losses.append(float(loss))
    return state.params, losses


def trace_sample(config: Any, params: Any) -> Any:
    """Return v' H v of one sentence, for random signs v: a sample of `hessian_trace`."""
    import jax

    from jaxflat.flatness import hessian_trace_samples
    from jaxflat.runs import builders
    from jaxflat.runs.measure_flatness import sample_microbatches

    batches = jax.tree.map(lambda x: x[:1], sample_microbatches(config, jax.random.key(1)))
    loss_fn, _ = builders.loss_functions(builders.make_model(config))
    names = "num_probes", "over"
    samples = jax.jit(hessian_trace_samples, static_argnums=0, static_argnames=names)
    return samples(loss_fn, params, batches, jax.random.key(2), num_probes=1, over="probes")


def main() -> None:
    """Print the figures of one point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, choices=[p.stem for p in CONFIGS.glob("*.py")])
    parser.add_argument("--width", type=int, required=True)
    flags = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    import jax

    from jaxflat.runs import builders
    from jaxflat.runs.languages import language_kind

    config = next(c for c in paper_configs(flags.config) if c.model.width == flags.width)
    (params, losses), training_s = timed(train, config)
    sample, trace_s = timed(partial(trace_sample, config), params)
    print(
        json.dumps(
            {
                "parameters": builders.num_params(config),
                "words": language_kind(config.language).sizes(config.language)[0],
                "losses": losses,
                "trace": float(sum(leaf.sum() for leaf in jax.tree.leaves(sample.terms))),
                "seconds": {"training": training_s, "trace": trace_s},
                "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / GIB,
            }
        )
    )


if __name__ == "__main__":
    main()
