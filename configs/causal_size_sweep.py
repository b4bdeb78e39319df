"""Does size matter at the same pre-training loss? Causal language models whose optimum is known.

    python -m jaxflat.main --config=configs/causal_size_sweep.py

Eight seeds of each width predict each next word of a hidden Markov model's sentences. Small models
train longer, so that excess losses overlap. --config.model.block=modern trains models like Llama.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, chain, named_scale, param, product, seeds, zipped

# Widths and, for each, the steps at which measured checkpoints branch off.
STEPS = {
    "smoke": {8: (40,), 16: (40,)},
    "laptop": {16: (3000, 5000), 32: (1200, 1900), 64: (500, 800)},
    "full": {16: (2000, 3000, 5000), 32: (800, 1200, 1900), 64: (350, 500, 800)},
    "gpu": {192: (4000, 8000, 14_000), 384: (2000, 3500, 5000), 768: (600, 900, 1200)},
    "paper": dict.fromkeys((96, 192, 384, 768, 1536), (30_000, 60_000)),
}
SEEDS = {"smoke": seeds(2), "laptop": seeds(8), "full": seeds(8, 2)}  # other scales have five


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    phase = config.phases.pretrain
    config.claims.update({"probe": "linear_probe_projected", "shots": 200})
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False})
    config.probes.update({"projected_dimension": 128, "labelings": ("map",)})
    if scale == "smoke":
        base_config.use_smoke_sizes(config, (phase,))
    if scale == "gpu":  # 3M to 43M parameters
        base_config.use_gpu_sizes(config, (phase,), targets="sampled")
        config.language.update(base_config.paper_grammar())
        phase.anneal_steps, config.flatness.num_probes = 200, 2
    if scale == "paper":  # 3M to 740M parameters at one depth
        config.language.update(base_config.paper_grammar())
        config.model.update({"width": 96, "num_layers": 26, "head_size": 48})
        phase.update({"batch_size": 4096, "microbatch_size": 256, "targets": "sampled"})
        phase.anneal_steps, config.claims.shots = 6000, 1000
        phase.schedule.update({"learning_rate": 1e-3, "warmup_steps": 1800})
        config.flatness.update({"microbatch_size": 256, "probes_per_pass": 1, "invariant": False})
        config.probes.update({"shots": (1000, 10_000), "projected_dimension": 512})
    config.language.masking, config.model.name = "causal", "causal"
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed, so that the first seed gives early results."""
    steps = STEPS[named_scale(scale)]
    sizes = zipped(
        param("model.width", steps),
        param("phases.pretrain.checkpoint_steps", steps.values()),
        param("phases.pretrain.steps", [s[-1] for s in steps.values()]),
    )
    models = product(param("model.name", ["causal"]), sizes)
    exact = product(param("model.name", ["lookup_table"]), param("phase_order", [()]))
    tables = product(exact, param("model.features", ["p", "log_p"]))
    return product(SEEDS.get(named_scale(scale), seeds(5)), chain(models, tables))
