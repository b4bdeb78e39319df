"""Does the algorithm matter at the same pre-training loss? Five arms share a warm start per seed.

    python -m jaxflat.main --config=configs/optimizer_sweep.py

"warm" trains five seeds on the exact conditionals of a balanced tree to near the optimum. The arms
continue by AdamW, SAM, Muon, or AdamW with an adversary that hides downstream labels, then without
("off"). Each checkpoint is annealed by the training that made it. Controls: the exact conditionals
as features, and the untrained model.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, arm, chain, named_scale, product, seeds

# Steps of the warm start, of its final decay, of each later phase, and of its anneal.
STEPS = {"smoke": (60, 20, 40, 20), "laptop": (4000, 1500, 800, 300)}
STEPS["full"] = (4000, 1500, 800, 300)
STEPS["paper"] = (60_000, 6000, 30_000, 6000)
WAYS = {"AdamW": ("adamw",), "SAM": ("sam",), "Muon": ("muon",)}
WAYS |= {"adversary then off": ("adversary", "off"), "adversary": ("adversary",)}
SEEDS = {"smoke": seeds(2), "laptop": seeds(5), "full": seeds(8, 2), "paper": seeds(5)}


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    num_warm, num_decay, num_on, num_anneal = STEPS[scale]
    config.language.name, config.phase_order = "balanced_tree", ("warm", "adamw")
    del config.phases.pretrain
    for name in ("warm", "adamw", "sam", "muon", "adversary", "off"):
        phase = config.phases[name] = base_config.phase()
        phase.update({"steps": num_on, "checkpoint_steps": (num_on,), "anneal_steps": num_anneal})
        phase.optimizer.name = name if name in ("sam", "muon") else "adamw"
    config.phases.warm.update({"steps": num_warm, "checkpoint_steps": ()})
    config.phases.warm.schedule.decay_steps = num_decay
    config.phases.adversary.adversary.strength = 0.005
    if scale == "smoke":
        config.model.num_layers = 1  # compiling takes most of the time
        for phase in config.phases.values():
            phase.batch_size, phase.schedule.warmup_steps = 32, 10
        config.phases.adversary.adversary.num_sentences = 64
        config.evaluation.update({"num_sentences": 256, "batch_size": 128})
        config.flatness.update({"num_microbatches": 4, "microbatch_size": 32, "num_probes": 2})
        config.probes.update({"num_validation": 256, "num_test": 512, "shots": (50, 200)})
    if scale == "paper":
        tree = {"depth": 5, "num_states": 10, "num_words": 200, "tasks": ((0, 32), (0, 16), (0, 8))}
        config.language.balanced_tree.update(tree)
        config.model.update({"width": 768, "num_layers": 26, "head_size": 48})
        for phase in config.phases.values():
            phase.batch_size, phase.schedule.learning_rate = 4096, 1e-3
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed; the first arm is the baseline."""
    model, table = {"model.name": "transformer"}, {"model.name": "lookup_table", "phase_order": ()}
    trained = [arm(name, model | {"phase_order": ("warm", *way)}) for name, way in WAYS.items()]
    untrained = arm("untrained", model | {"phase_order": ()})
    p, log_p = (table | {"model.features": features} for features in ("p", "log_p"))
    tables = chain(arm("lookup p", p), arm("lookup log p", log_p))
    return product(SEEDS[named_scale(scale)], chain(*trained, untrained, tables))
