"""Does size matter at the same pre-training loss? Bidirectional LSTMs on a hidden Markov model.

    python -m jaxflat.main --config=configs/lstm_size_sweep.py

The paper trains LSTMs on this language. As in model_size_sweep.py, five seeds of each width are
compared. Small models train longer, so that excess losses overlap. Probes see few labels and 128
dimensions of the features.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, named_scale, param, product, seeds, zipped

# Widths and, for each, the steps at which measured checkpoints branch off.
STEPS = {
    "smoke": {8: (40,), 16: (40,)},
    "laptop": {16: (2000, 3200), 32: (600, 1000), 64: (250, 500)},
    "full": {16: (1200, 2000, 3200), 32: (400, 600, 1000), 64: (250, 350, 500)},
    "gpu": {240: (5000, 8000, 12_000), 480: (2000, 3000, 4500), 960: (800, 1200, 1800)},
    "paper": dict.fromkeys((480, 960, 1920), (30_000, 60_000)),
}
SEEDS = {"smoke": seeds(2), "full": seeds(8, 2)}
SEEDS["laptop"] = SEEDS["gpu"] = SEEDS["paper"] = seeds(5)


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    phase, config.model.name = config.phases.pretrain, "lstm"
    config.claims.update({"probe": "linear_probe_projected", "shots": 200})
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False})
    config.probes.update({"projected_dimension": 128, "labelings": ("map",), "belief_state": False})
    if scale == "smoke":
        base_config.use_smoke_sizes(config, (phase,))
    if scale == "gpu":  # 2M to 34M parameters
        config.language.update(base_config.paper_hmm())
        config.training.compute_dtype = "bfloat16"
        phase.update({"batch_size": 1024, "targets": "sampled", "anneal_steps": 300})
        phase.schedule.learning_rate = 1e-3
    if scale == "paper":  # 8M to 134M parameters
        config.language.update(base_config.paper_hmm())
        phase.update({"batch_size": 4096, "microbatch_size": 256, "targets": "sampled"})
        phase.anneal_steps = 6000
        phase.schedule.update({"learning_rate": 1e-3, "warmup_steps": 1800})
        config.flatness.update({"microbatch_size": 256, "probes_per_pass": 1})
        config.probes.update({"shots": (1000, 10_000), "projected_dimension": 512})
        config.claims.shots = 1000
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed."""
    steps = STEPS[named_scale(scale)]
    sizes = zipped(
        param("model.width", steps),
        param("phases.pretrain.checkpoint_steps", steps.values()),
        param("phases.pretrain.steps", [s[-1] for s in steps.values()]),
    )
    return product(SEEDS[named_scale(scale)], sizes)
