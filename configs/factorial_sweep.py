"""What flattens: size, learning rate, batch size or label noise? Every combination of two levels.

    python -m jaxflat.main --config=configs/factorial_sweep.py

"warm" trains on the exact conditionals of two hidden Markov models. "drift" continues by plain SGD,
on sampled words or, without label noise, on exact conditionals. "settle" then removes the noise, by
AdamW on exact conditionals. Its annealed branches let runs be compared at the same excess loss.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, named_scale, param, product, seeds

# Steps of "warm" and "drift", the steps of "settle" where anneals branch off, steps of an anneal.
STEPS = {"smoke": (100, 100, (50, 100), 20), "laptop": (600, 2000, (100, 400, 1600), 100)}
STEPS["full"], STEPS["gpu"] = ((warm, 8000, (100, 400, 1600, 6400), 100) for warm in (600, 2000))
STEPS["paper"] = (6000, 60_000, (1000, 6000, 30_000), 1000)
WIDTHS = {"smoke": (8, 16), "gpu": (192, 384), "paper": (384, 768)}
BATCHES = {"gpu": (32, 128), "paper": (256, 1024)}  # of "drift"
SEEDS = {"smoke": seeds(1), "full": seeds(8, 2), "gpu": seeds(3), "paper": seeds(3, 2)}


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    num_warm, num_drift, ladder, num_anneal = STEPS[scale]
    warm, drift, settle = phases = [base_config.phase() for _ in range(3)]
    warm.update({"steps": num_warm, "checkpoint_steps": ()})
    drift.update({"steps": num_drift, "checkpoint_steps": (), "optimizer": {"name": "sgd"}})
    settle.update({"steps": ladder[-1], "checkpoint_steps": ladder, "anneal_steps": num_anneal})
    if scale == "smoke":
        base_config.use_smoke_sizes(config, ())
        config.probes.iterations = 50
    settle.batch_size, settle.schedule.learning_rate = 64, 2e-3
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False, "num_probes": 2})
    config.probes.update({"labelings": ("map",), "belief_state": False, "shots": (200,)})
    config.probes.projected_dimension, config.flatness.num_microbatches = 128, 16
    config.claims.update({"primary": "flatness", "probe": "linear_probe_projected"})
    if scale == "gpu":
        base_config.use_gpu_sizes(config, (warm, settle), targets="exact")
        config.language.update(base_config.paper_hmm())
    if scale == "paper":
        config.language.update(base_config.paper_hmm())
        config.model.update({"num_layers": 26, "head_size": 48})
        warm.batch_size = settle.batch_size = 4096
        warm.microbatch_size = drift.microbatch_size = settle.microbatch_size = 256
    config.phase_order = ("warm", "drift", "settle")
    config.phases = dict(zip(config.phase_order, phases, strict=True))
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed."""
    scale = named_scale(scale)
    return product(
        SEEDS.get(scale, seeds(2, 2)),
        param("model.width", WIDTHS.get(scale, (32, 64))),
        param("phases.drift.schedule.learning_rate", [0.02, 0.08]),
        param("phases.drift.batch_size", BATCHES.get(scale, (16, 64))),
        param("phases.drift.targets", ["exact", "sampled"]),
    )
