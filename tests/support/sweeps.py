"""A sweep small enough to run many times in the tests."""

from ml_collections import ConfigDict

from jaxflat import config as base_config
from jaxflat.config import Sweep, chain, param, product


def tiny_config() -> ConfigDict:
    """Two phases, three measured checkpoints, a projection, all as small as it goes."""
    config = base_config.base()
    config.language.hmm.update({"num_states": 3, "num_words": 6, "length": 4, "min_length": 2})
    config.language.hmm.tasks = (2,)
    config.model.update({"width": 8, "num_layers": 1})
    config.mesh.data = 1
    config.phase_order = ("pretrain", "drift")
    config.phases.drift = base_config.phase()
    config.phases.drift.update({"targets": "sampled", "steps": 6, "anneal_steps": 0})
    config.phases.drift.optimizer.name = "sgd"
    config.phases.drift.checkpoint_steps = (6,)
    projection = {"checkpoint_steps": (6,), "steps": 3, "batch_size": 8}
    config.phases.drift.projection.update(projection)
    config.phases.pretrain.update({"steps": 10, "anneal_steps": 4, "checkpoint_steps": (3, 10)})
    for phase in config.phases.values():
        phase.batch_size = 8
        phase.schedule.warmup_steps = 2
    config.training.update({"steps_per_call": 2, "save_every": 2})
    config.evaluation.update({"num_sentences": 16, "batch_size": 8})
    config.flatness.update({"num_microbatches": 2, "microbatch_size": 8, "num_probes": 2})
    config.flatness.learning_coefficient.num_draws = 20
    config.probes.update({"num_draws": 2, "num_validation": 16, "num_test": 32, "iterations": 5})
    config.probes.shots = (8, 16)
    return config


def causal_config(block: str = "gpt") -> ConfigDict:
    """The same with a causal model."""
    config = tiny_config()
    config.language.masking = "causal"
    config.model.update({"name": "causal", "block": block})
    return config


def tiny_sweep(num_seeds: int = 2) -> Sweep:
    """Seeds of two widths and a lookup table."""
    return chain(
        product(param("seed", range(num_seeds)), param("model.width", [8, 16])),
        product(
            param("seed", [0]), param("model.name", ["lookup_table"]), param("phase_order", [()])
        ),
    )


def every_stage() -> ConfigDict:
    """A run with something of each stage: two rounds, an embedding, a projection, fine-tuning."""
    config = tiny_config()
    config.phases.drift.targets = "exact"  # one program is compiled for all of training
    config.phases.drift.optimizer.name = "adamw"
    config.phases.pretrain.checkpoint_steps = (3,)
    config.flatness.measures = ("fisher_trace", "gauss_newton_trace")  # soon compiled
    config.flatness.update({"embedded_width": 16, "relative_error": 1e-9, "max_rounds": 2})
    config.flatness.update({"num_microbatches": 64, "microbatch_size": 1})
    tuning = {"shots": 8, "num_draws": 2, "batch_size": 4, "epochs": 1, "warmup_steps": 1}
    config.probes.finetune.update(tuning)
    return config
