"""Do all penalties that change flatness change accuracy alike? Six of them share a warm start.

    python -m jaxflat.main --config=configs/penalty_sweep.py

"warm" trains eight seeds on the exact conditionals of a hidden Markov model. "dial" continues each
by AdamW with a penalty on a curvature (the trace, the largest eigenvalue) or on a control (the
parameters' norm, the features' rank). Annealed branches let them be compared at equal excess loss.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, arm, chain, named_scale, product, seeds

# Steps of the warm start, steps of an anneal, and the steps of "dial" where anneals branch off.
STEPS = {"smoke": (40, 10, (10, 20)), "paper": (30_000, 6000, (6000, 15_000, 30_000))}
STEPS["laptop"] = STEPS["full"] = STEPS["gpu"] = (2500, 250, (300, 600, 1000, 1500))
PENALTIES = {
    "lower trace": ("gauss_newton_trace", 1e-4),
    "lower eigenvalue": ("hessian_max_eigenvalue", 1e-3),
    "higher eigenvalue": ("hessian_max_eigenvalue", -5e-5),
    "lower norm": ("parameter_norm", 3e-5),
    "lower rank": ("feature_rank", 3e-3),
    "higher rank": ("feature_rank", -3e-3),
}
SEEDS = {"smoke": seeds(2), "full": seeds(8, 2), "gpu": seeds(5)}
SEEDS["laptop"] = SEEDS["paper"] = seeds(8)


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    num_warm, num_anneal, ladder = STEPS[scale]
    config.claims.update({"primary": "effect", "shots": 200})
    warm, dial = base_config.phase(), base_config.phase()
    warm.update({"steps": num_warm, "checkpoint_steps": ()})
    dial.update({"steps": ladder[-1], "checkpoint_steps": ladder, "anneal_steps": num_anneal})
    dial.flatness_penalty.max_excess = 0.05  # negative strengths stop where the loss breaks down
    config.flatness.update({"measures": ("hessian_trace", "hessian_eigenvalues")})
    config.flatness.update({"by_block": False, "num_probes": 2})
    config.flatness.eigenvalues.update({"num_largest": 1, "num_smallest": 0, "num_steps": 20})
    if scale == "smoke":
        base_config.use_smoke_sizes(config, (warm, dial))
        config.model.width = 8
    if scale == "gpu":
        base_config.use_gpu_sizes(config, (warm, dial), targets="exact")
        config.language.update(base_config.paper_hmm())
    if scale == "paper":
        base_config.use_paper_sizes(config, (warm, dial))
        dial.microbatch_size, config.training.remat = 0, True  # eigenvalues need the whole batch
    config.phases, config.phase_order = {"warm": warm, "dial": dial}, ("warm", "dial")
    config.probes.update({"labelings": ("map",), "belief_state": False})
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the penalties of each seed; the first arm, without one, is the baseline."""
    key = "phases.dial.flatness_penalty"
    arms = [arm("no penalty", {f"{key}.strength": 0.0})]
    for name, (measure, strength) in PENALTIES.items():
        arms += [arm(name, {f"{key}.measure": measure, f"{key}.strength": strength})]
    return product(SEEDS[named_scale(scale)], chain(*arms))
