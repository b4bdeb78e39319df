"""Does size matter at the same pre-training loss? Transformers of several widths, one language.

    python -m jaxflat.main --config=configs/model_size_sweep.py

Five seeds of each width learn the exact conditionals of a hidden Markov model. Small models train
longer, so that excess losses overlap. Probes see few labels and 128 dimensions of the features.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, chain, named_scale, param, product, seeds, zipped

STEPS = {  # widths and, for each, the steps at which measured checkpoints branch off
    "smoke": {8: (40,), 16: (40,)},
    "laptop": {16: (5000, 8000), 32: (1700, 2400), 64: (700, 950)},
    "full": {16: (3000, 5000, 8000), 32: (1200, 1700, 2400), 64: (500, 700, 950)},
    "gpu": {192: (4000, 8000, 14_000), 384: (2000, 3500, 5000), 768: (600, 900, 1200)},
    "paper": dict.fromkeys((96, 192, 384, 768, 1536), (30_000, 60_000)),
}
SEEDS = {"smoke": seeds(2), "full": seeds(8, 2)}  # other scales have five


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    phase = config.phases.pretrain
    config.claims.update({"probe": "linear_probe_projected", "shots": 200})
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False})
    config.probes.update({"projected_dimension": 128, "labelings": ("map",), "belief_state": False})
    if scale == "laptop":  # small microbatches: almost as precise, in half the time
        config.flatness.update({"num_microbatches": 64, "microbatch_size": 32, "num_probes": 2})
        config.probes.shots, config.training.save_every = (200,), 16  # claims rest on 200 labels
    if scale == "smoke":
        base_config.use_smoke_sizes(config, (phase,))
    if scale == "gpu":  # 3M to 43M parameters
        base_config.use_gpu_sizes(config, (phase,), targets="sampled")
        config.language.update(base_config.paper_grammar())
        phase.anneal_steps, config.evaluation.num_positions, config.flatness.num_probes = 200, 8, 2
    if scale == "paper":  # 3M to 740M parameters at one depth; invariant traces would hold 99 GiB
        config.language.update(base_config.paper_grammar())
        config.model.update({"width": 96, "num_layers": 26, "head_size": 48})
        phase.update({"batch_size": 4096, "microbatch_size": 256, "targets": "sampled"})
        phase.anneal_steps, phase.schedule.warmup_steps = 6000, 1800
        phase.schedule.learning_rate, config.claims.shots = 1e-3, 1000
        config.flatness.update({"microbatch_size": 256, "probes_per_pass": 1, "invariant": False})
        config.probes.update({"shots": (1000, 10_000), "projected_dimension": 512})
    return config


def get_sweep(scale: str | None = None) -> Sweep:
    """Return the points, seed by seed, so that the first seed gives early results."""
    steps = STEPS[named_scale(scale)]
    sizes = zipped(
        param("model.width", steps),
        param("phases.pretrain.checkpoint_steps", steps.values()),
        param("phases.pretrain.steps", [s[-1] for s in steps.values()]),
    )
    exact = product(param("model.features", ["p", "log_p"]), param("phase_order", [()]))
    transformers = product(param("model.name", ["transformer"]), sizes)
    tables = product(param("model.name", ["lookup_table"]), exact)
    return product(SEEDS.get(named_scale(scale), seeds(5)), chain(transformers, tables))
