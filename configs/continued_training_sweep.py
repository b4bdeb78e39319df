"""Does training on after convergence flatten, and is it the label noise? Two arms of one phase.

    python -m jaxflat.main --config=configs/continued_training_sweep.py

Five seeds are trained on the exact conditionals of a balanced tree until they are near the optimum
("warm"), and then far beyond by plain SGD at a constant learning rate ("continue"): on sampled
words, or, the noise control, on exact targets, all else equal. Start and end of the trajectory are
measured as they are and projected: annealed by AdamW on exact targets, so that what the noise of
the last steps adds to the loss is not taken for a change of the minimum.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, named_scale, param, product

# Steps of the warm start (and of its decay at the end), and of the continued training.
STEPS = {"smoke": (60, 20, 60), "laptop": (4000, 1500, 8000), "paper": (60_000, 6000, 200_000)}
NUM_SEEDS = {"smoke": 2, "laptop": 5, "paper": 5}


def get_config(scale: str | None = None) -> Config:
    """Return what both arms share."""
    scale, config = named_scale(scale), base_config.base()
    num_warm, num_decay, num_continue = STEPS[scale]
    config.language.name = "balanced_tree"
    config.phase_order = ("warm", "continue")
    del config.phases.pretrain
    config.phases.update({"warm": base_config.phase(), "continue": base_config.phase()})
    warm, on = config.phases["warm"], config.phases["continue"]
    warm.update({"steps": num_warm, "checkpoint_steps": (num_warm,)})
    warm.schedule.decay_steps = num_decay
    on.update({"batch_size": 32, "steps": num_continue, "targets": "sampled"})
    on.checkpoint_steps = (num_continue // 4, num_continue)
    on.optimizer.name = "sgd"
    on.schedule.update({"learning_rate": 0.1, "warmup_steps": num_continue // 8})
    for phase in (warm, on):
        phase.anneal_steps = 0
        phase.projection.checkpoint_steps = phase.checkpoint_steps[-1:]
    if scale == "smoke":
        config.model.update({"num_layers": 1, "width": 8})
        warm.batch_size, warm.schedule.warmup_steps = 32, 10
        warm.projection.update({"steps": 20, "batch_size": 32})
        on.projection.update({"steps": 20, "batch_size": 32})
        config.evaluation.update({"num_sentences": 256, "batch_size": 128})
        config.flatness.update({"num_microbatches": 4, "microbatch_size": 32, "num_probes": 2})
        config.probes.update({"num_draws": 2, "num_validation": 256, "num_test": 512})
        config.probes.update({"shots": (50, 200), "iterations": 50})
    if scale == "paper":
        config.language.balanced_tree.update({"depth": 5, "num_states": 10, "num_words": 200})
        config.language.balanced_tree.tasks = ((0, 32), (0, 16), (0, 8))
        config.model.update({"width": 768, "num_layers": 26, "head_size": 48})
        warm.batch_size, on.batch_size = 4096, 4096
        on.schedule.learning_rate = 1e-3
        for phase in (warm, on):
            phase.projection.update({"steps": 6000, "batch_size": 4096})
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed: the two arms share the warm start of their seed."""
    arms = param("phases.continue.targets", ["sampled", "exact"])
    return product(param("seed", range(NUM_SEEDS[named_scale(scale)])), arms)
