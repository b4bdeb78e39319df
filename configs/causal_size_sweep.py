"""Does size matter at the same pre-training loss? Causal language models, optimum known.

    python -m jaxflat.main --config=configs/causal_size_sweep.py

Eight seeds of each width predict each next word of a hidden Markov model's sentences. As in
model_size_sweep.py, small models train longer, so that excess losses overlap. The block is GPT-2's;
--config.model.block=modern takes Llama's.
"""

from jaxflat import config as base_config
from jaxflat.config import Config, Sweep, chain, named_scale, param, product, seeds, zipped

# Widths and, for each, the steps at which measured checkpoints branch off.
STEPS = {
    "smoke": {8: (40,), 16: (40,)},
    "laptop": {16: (3000, 5000, 8000), 32: (1200, 1700, 2400), 64: (500, 700, 950)},
}


def get_config(scale: str | None = None) -> Config:
    """Return the config that all points share."""
    scale, config = named_scale(scale), base_config.base()
    phase = config.phases.pretrain
    config.language.masking, config.model.name = "causal", "causal"
    config.claims.update({"probe": "linear_probe_projected", "shots": 200})
    config.flatness.update({"measures": ("hessian_trace",), "by_block": False})
    config.probes.update({"projected_dimension": 128, "labelings": ("map",)})
    if scale == "smoke":
        base_config.use_smoke_sizes(config, (phase,))
        phase.anneal_steps = 20
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
    models = product(param("model.name", ["causal"]), sizes)
    tables = product(param("model.name", ["lookup_table"]), exact)
    return product(seeds(2) if scale == "smoke" else seeds(8), chain(models, tables))
