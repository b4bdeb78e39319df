"""Does training past convergence flatten, because of label noise? Three arms share a warm start.

    python -m jaxflat.main --config=configs/continued_training_sweep.py

"warm" trains five seeds on the exact conditionals of a balanced tree to near the optimum.
"continue" trains them further by plain SGD at a constant learning rate: on sampled words or, as the
control without noise, on exact targets. "settle", by AdamW on exact targets, then removes the
noise of the last steps, which may look like drift; "not continued" goes there at once. Annealed
branches at several of its steps let arms be compared at the same excess loss.

Label noise moves SGD by t = (learning rate)^2 steps / batch (docs/theory.md): 2.3 at `laptop`, 2.5
at `gpu`, 2.6 at `paper`. The learning rate (1e-3) and batch (4096) of Liu et al. would give 4.5e-5.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, arm, chain, named_scale, product, seeds

# Steps of "warm", of its final decay, of "continue", and of "settle" where anneals branch off.
STEPS = {"smoke": (60, 20, 60, (10, 20)), "laptop": (4000, 1500, 8000, (100, 400, 1600, 3200))}
STEPS["full"] = (4000, 1500, 16_000, (100, 400, 1600, 3200))
STEPS["gpu"] = (3000, 1000, 24_000, (100, 400, 1600, 3200))
STEPS["paper"] = (60_000, 6000, 200_000, (1000, 6000, 30_000))
SEEDS = {"smoke": seeds(2), "full": seeds(8, 2)}
SEEDS["laptop"] = SEEDS["gpu"] = SEEDS["paper"] = seeds(5)


def get_config(scale: str | None = None) -> Config:
    """Return the config that all arms share."""
    scale, config = named_scale(scale), base_config.base()
    num_warm, num_decay, num_continue, ladder = STEPS[scale]
    config.language.name, config.claims.primary = "balanced_tree", "flatness"
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False})
    config.probes.update({"labelings": ("map",), "belief_state": False})
    config.claims.shots = 200
    warm, on, settle = (base_config.phase() for _ in range(3))
    warm.steps, warm.checkpoint_steps, warm.schedule.decay_steps = num_warm, (), num_decay
    on.update({"steps": num_continue, "checkpoint_steps": (), "optimizer": {"name": "sgd"}})
    on.batch_size, on.schedule.learning_rate, on.schedule.warmup_steps = 32, 0.1, num_continue // 8
    settle.update({"steps": ladder[-1], "checkpoint_steps": ladder})
    if scale == "smoke":
        base_config.use_smoke_sizes(config, (warm, settle))
        config.model.width, settle.anneal_steps = 8, 10
    if scale == "gpu":
        base_config.use_gpu_sizes(config, (warm, settle), targets="exact")
        config.language.update(base_config.paper_hmm())
        on.schedule.learning_rate = 0.06
    if scale == "paper":
        base_config.use_paper_sizes(config, (warm, settle))
        on.batch_size, on.schedule.learning_rate = 64, 0.03  # t as at laptop, see the docstring
    config.phases = {"warm": warm, "continue": on, "settle": settle}
    config.phase_order = ("warm", "continue", "settle")
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed; the first arm is the baseline."""
    exact = arm("exact targets", {"phases.continue.targets": "exact"})
    noise = arm("label noise", {"phases.continue.targets": "sampled"})
    start = arm("not continued", {"phase_order": ("warm", "settle")})
    return product(SEEDS[named_scale(scale)], chain(exact, noise, start))
