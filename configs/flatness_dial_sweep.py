"""Does flatness itself matter? A penalty turns it both ways from one trained model per seed.

    python -m jaxflat.main --config=configs/flatness_dial_sweep.py

"warm" trains eight seeds on the exact conditionals of a hidden Markov model. "dial" continues each
by AdamW on exact targets plus `strength` times the Gauss-Newton trace: 0, and doses of both signs.
Annealed branches at several steps let doses be compared at the same excess loss. In 20 minutes:
traces differ by 1.96 (1.91 to 2.01), accuracy by -0.46 (-0.75 to -0.16) points per halving.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, named_scale, param, product, seeds

# Steps of the warm start, steps of an anneal, and the steps of "dial" where anneals branch off.
STEPS = {
    "smoke": (40, 10, (10, 20)),
    "laptop": (2500, 250, (300, 600, 1000, 1500)),
    "full": (2500, 250, (300, 600, 1000, 1500)),
    "gpu": (2500, 250, (300, 600, 1000, 1500)),
    "paper": (30_000, 6000, (6000, 15_000, 30_000)),
}
DOSES = {"smoke": (0.0, 1e-4), "full": (0.0, -2e-5, 1e-4)}
DOSES["laptop"] = DOSES["gpu"] = DOSES["paper"] = (0.0, -1e-5, 1e-4)
SEEDS = {"smoke": seeds(2), "full": seeds(8, 2), "gpu": seeds(5)}
SEEDS["laptop"] = SEEDS["paper"] = seeds(8)


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    num_warm, num_anneal, ladder = STEPS[scale]
    config.phase_order, config.claims.primary = ("warm", "dial"), "effect"
    del config.phases.pretrain
    warm, dial = base_config.phase(), base_config.phase()
    warm.update({"steps": num_warm, "checkpoint_steps": ()})
    dial.update({"steps": ladder[-1], "checkpoint_steps": ladder, "anneal_steps": num_anneal})
    dial.flatness_penalty.max_excess = 0.05  # negative doses stop where the loss breaks down
    if scale == "smoke":
        base_config.use_smoke_sizes(config, (warm, dial))
        config.model.width = 8
    if scale == "gpu":
        base_config.use_gpu_sizes(config, (warm, dial), targets="exact")
        config.language.update(base_config.paper_hmm())
    if scale == "paper":
        base_config.use_paper_sizes(config, (warm, dial))
    config.phases.warm, config.phases.dial = warm, dial
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False, "num_probes": 2})
    config.probes.update({"labelings": ("map",), "belief_state": False})
    config.claims.shots = 200
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the doses of each seed; the first dose, 0, is the baseline."""
    scale = named_scale(scale)
    return product(SEEDS[scale], param("phases.dial.flatness_penalty.strength", DOSES[scale]))
