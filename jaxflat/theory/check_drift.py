"""Result 2: the noise of sampled answers makes SGD drift along the minimisers to a smaller trace.

`flow` has the equation, `pair` a case with a closed form, and `factors` a language model.
"""

import jax

from jaxflat.theory import factors, pair
from jaxflat.theory.check import CheckOutcome
from jaxflat.theory.flow import flow


def run() -> CheckOutcome:
    """Compare SGD with the flow of the trace in both cases."""
    keys = iter(jax.random.split(jax.random.key(0), 10))
    decays = [pair.decay(rate, 1, next(keys), pair.NUM_CHAINS) for rate in pair.RATES]
    large = pair.decay(pair.ITS_RATE, pair.LARGE_BATCH, next(keys), pair.NUM_CHAINS)
    problem, params_P = factors.make_table()
    path_GxP = flow(problem, params_P, factors.GRID, steps_per_time=4)
    flow_G = factors.traces(problem, path_GxP)

    def drifts(batch_size: int, num_records: int) -> list[factors.Drift]:
        return [
            factors.drift(problem, params_P, rate, batch_size, num_records, next(keys))
            for rate in factors.RATES
        ]

    small, large_batch = drifts(1, len(factors.TIMES)), drifts(factors.LARGE_BATCH, 1)
    checks = pair.checks(decays, large)
    checks += factors.checks(problem, path_GxP, small, large_batch)
    panels = [
        ("Two parameters", lambda ax: pair.draw(ax, decays)),
        ("A table in two factors", lambda ax: factors.draw(ax, flow_G, small)),
    ]
    size = f"{len(problem.weights_C)} questions, {params_P.size} parameters"
    lines = [
        "u, v: logit = u v, labels 1 with probability sigmoid(1), D = u^2 - v^2",
        f"table: logits = R K on a hidden Markov model, {size}, "
        f"tr H = {flow_G[0]:.4g} at the start",
    ]
    return CheckOutcome(checks, panels, lines)
