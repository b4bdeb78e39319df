"""Does training past convergence flatten, because of label noise? Two arms share a warm start.

    python -m jaxflat.main --config=configs/continued_training_sweep.py

"warm" trains five seeds on the exact conditionals of a balanced tree to near the optimum.
"continue" trains them further by plain SGD at a constant learning rate: on sampled words or, as the
control without noise, on exact targets. Start and end are measured before and after an exact
anneal by AdamW on exact targets: it removes noise of the last steps, which may look like drift.
Hessian trace, end over start, annealed: sampled 0.47 (0.44 to 0.49), exact 1.02 (0.99 to 1.05).
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, arm, chain, named_scale, product, seeds

# Steps of the warm start, of its final decay, of continued training and of a projection.
STEPS = {"smoke": (60, 20, 60, 20), "laptop": (4000, 1500, 8000, 1500)}
STEPS["full"] = (4000, 1500, 16_000, 1500)
STEPS["paper"] = (60_000, 6000, 200_000, 6000)
SEEDS = {"smoke": seeds(2), "laptop": seeds(5), "full": seeds(8, 2), "paper": seeds(5)}


def get_config(scale: str | None = None) -> Config:
    """Return the config that both arms share."""
    scale, config = named_scale(scale), base_config.base()
    num_warm, num_decay, num_continue, num_projection = STEPS[scale]
    config.language.name, config.claims.primary = "balanced_tree", "label noise"
    config.phase_order = ("warm", "continue")
    del config.phases.pretrain
    warm, on = base_config.phase(), base_config.phase()
    warm.update({"steps": num_warm, "checkpoint_steps": (num_warm,)})
    warm.schedule.decay_steps = num_decay
    on.update({"steps": num_continue, "checkpoint_steps": (num_continue // 4, num_continue)})
    on.batch_size, on.targets, on.optimizer.name = 32, "sampled", "sgd"
    on.schedule.update({"learning_rate": 0.1, "warmup_steps": num_continue // 8})
    if scale == "smoke":
        config.model.update({"num_layers": 1, "width": 8})
        warm.batch_size, warm.schedule.warmup_steps = 32, 10
        config.evaluation.update({"num_sentences": 256, "batch_size": 128})
        config.flatness.update({"num_microbatches": 4, "microbatch_size": 32, "num_probes": 2})
        few = {"num_validation": 256, "num_test": 512, "shots": (50, 200), "iterations": 50}
        config.probes.update(few)
    if scale == "paper":
        tree = {"depth": 5, "num_states": 10, "num_words": 200, "tasks": ((0, 32), (0, 16), (0, 8))}
        config.language.balanced_tree.update(tree)
        config.model.update({"width": 768, "num_layers": 26, "head_size": 48})
        for phase in (warm, on):
            phase.batch_size, phase.schedule.learning_rate = 4096, 1e-3
    for name, phase in (("warm", warm), ("continue", on)):
        phase.anneal_steps, last = 0, phase.checkpoint_steps[-1:]
        phase.projection.update({"checkpoint_steps": last, "steps": num_projection})
        phase.projection.batch_size = warm.batch_size
        config.phases[name] = phase
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed."""
    noise = arm("label noise", {"phases.continue.targets": "sampled"})
    exact = arm("exact targets", {"phases.continue.targets": "exact"})
    return product(SEEDS[named_scale(scale)], chain(noise, exact))
