"""Does the algorithm matter at the same pre-training loss? Five arms share a warm start per seed.

    python -m jaxflat.main --config=configs/optimizer_sweep.py

"warm" trains on the exact conditionals of a balanced tree. Arms continue by AdamW, SAM or Muon, or
with an adversary that hides downstream labels. Annealed branches let arms be read at equal loss.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, arm, chain, named_scale, product, seeds

# Steps of "warm", of its final decay, of a later phase where anneals branch off, and of an anneal.
STEPS = {"smoke": (60, 20, (20, 40), 20), "paper": (60_000, 6000, (7500, 15_000, 30_000), 6000)}
STEPS["laptop"] = STEPS["full"] = STEPS["gpu"] = (2000, 750, (200, 400, 800, 1600), 300)
WAYS = {"AdamW": "adamw", "SAM": "sam", "Muon": "muon", "adversary": "adversary"}
SEEDS = {"smoke": seeds(2), "full": seeds(8, 2)}
SEEDS["laptop"] = SEEDS["gpu"] = SEEDS["paper"] = seeds(5)


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    num_warm, num_decay, ladder, num_anneal = STEPS[scale]
    config.language.name, config.phase_order = "balanced_tree", ("warm", "adamw")
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False})
    config.probes.update({"labelings": ("map",), "belief_state": False})
    config.claims.shots = 200
    config["phases"] = {name: base_config.phase() for name in ("warm", *WAYS.values(), "off")}
    for name, phase in config.phases.items():
        rungs = ladder[:-1] if name in ("adversary", "off") else ladder
        phase.update({"steps": rungs[-1], "checkpoint_steps": rungs, "anneal_steps": num_anneal})
        phase.optimizer.name = name if name in ("sam", "muon") else "adamw"
    warm, adversary = config.phases.warm, config.phases.adversary.adversary
    warm.steps, warm.checkpoint_steps, warm.schedule.decay_steps = num_warm, (), num_decay
    adversary.strength = 0.005
    if scale == "smoke":
        base_config.use_smoke_sizes(config, config.phases.values())
        adversary.num_sentences = 64
    if scale == "gpu":
        base_config.use_gpu_sizes(config, config.phases.values(), targets="sampled")
        config.language.update(base_config.paper_grammar())
    if scale == "paper":
        base_config.use_paper_sizes(config, config.phases.values())
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed; the first arm is the baseline."""
    model, table = {"model.name": "transformer"}, {"model.name": "lookup_table", "phase_order": ()}
    trained = [arm(name, model | {"phase_order": ("warm", way)}) for name, way in WAYS.items()]
    off = {"phase_order": ("warm", "adversary", "off"), "phases.adversary.checkpoint_steps": ()}
    trained.append(arm("adversary then off", model | off))
    untrained = arm("untrained", model | {"phase_order": ()})
    p, log_p = (table | {"model.features": features} for features in ("p", "log_p"))
    controls = untrained, arm("lookup p", p), arm("lookup log p", log_p)
    return product(SEEDS[named_scale(scale)], chain(*trained, *controls))
