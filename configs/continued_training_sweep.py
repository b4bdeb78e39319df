"""Does training past convergence flatten, because of label noise? Three arms share a warm start.

    python -m jaxflat.main --config=configs/continued_training_sweep.py

"warm" trains five seeds on the exact conditionals of a balanced tree to near the optimum.
"continue" trains them further by plain SGD at a constant learning rate: on sampled words or, as the
control without noise, on exact targets. "settle", by AdamW on exact targets, then removes the
noise of the last steps, which may look like drift; "not continued" goes there at once. Annealed
branches at several of its steps let arms be compared at the same excess loss.

Label noise moves SGD by t = (learning rate)^2 steps / batch (docs/theory.md): 2.3 at `laptop` and
2.6 at `paper`. With the learning rate (1e-3) and batch (4096) of Liu et al. it would be 4.5e-5.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, arm, chain, named_scale, product, seeds

# Steps of "warm", of its final decay, of "continue", and of "settle" where anneals branch off.
STEPS = {"smoke": (60, 20, 60, (10, 20)), "laptop": (4000, 1500, 8000, (100, 400, 1600, 3200))}
STEPS["full"] = (4000, 1500, 16_000, (100, 400, 1600, 3200))
STEPS["paper"] = (60_000, 6000, 200_000, (1000, 6000, 30_000))
SEEDS = {"smoke": seeds(2), "laptop": seeds(5), "full": seeds(8, 2), "paper": seeds(5)}


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
    on.batch_size = 32
    on.schedule.update({"learning_rate": 0.1, "warmup_steps": num_continue // 8})
    settle.update({"steps": ladder[-1], "checkpoint_steps": ladder})
    if scale == "smoke":
        config.model.update({"num_layers": 1, "width": 8})
        settle.anneal_steps = 10
        for phase in (warm, settle):
            phase.batch_size, phase.schedule.warmup_steps = 32, 10
        config.evaluation.update({"num_sentences": 256, "batch_size": 128})
        config.flatness.update({"num_microbatches": 4, "microbatch_size": 32, "num_probes": 2})
        config.probes.update({"num_validation": 256, "num_test": 512, "shots": (50, 200)})
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
