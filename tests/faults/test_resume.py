"""Training that is stored and taken up again is the same training to the bit, by each optimizer."""

from itertools import product

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from trials import ALL, TRIALS

from jaxflat import checkpoint, experiment, trajectory
from jaxflat import config as base_config
from jaxflat.languages.batches import Source

OPTIMIZERS = [
    n for n, keys in base_config.phase().optimizer.items() if isinstance(keys, ConfigDict)
]
ALWAYS = [("adamw", "exact"), ("muon", "sampled")]
REST = [pair for pair in product(OPTIMIZERS, ("exact", "sampled")) if pair not in ALWAYS]


def resolved(optimizer: str, targets: str) -> FrozenConfigDict:
    config = base_config.base()
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.model.update({"width": 8, "num_layers": 2 if optimizer == "muon" else 1})
    config.language.hmm.min_length = 4
    config.phases.pretrain.targets = targets
    config.phases.pretrain.optimizer.name = optimizer
    return FrozenConfigDict(config)


@pytest.mark.parametrize(
    ("optimizer", "targets"),
    [
        *ALWAYS,
        *(pytest.param(*p, marks=pytest.mark.slow) for p in REST[:: max(ALL // TRIALS, 1)]),
    ],
)
def test_calls_of_any_length_and_stored_in_between_are_the_same_training(
    optimizer, targets, tmp_path
):
    config = resolved(optimizer, targets)
    (phase,) = trajectory.phases(config)
    mesh = experiment.sharding.make_mesh(1)
    steps = experiment.train_steps(experiment.make_model(config), phase.settings, "one", mesh)
    schedule = experiment.schedule(phase.settings, anneal=False)
    language = experiment.make_language(config.language)
    finals = []
    for stops in ((12,), (5, 6, 12)):
        state = experiment.init_state(experiment.init_params(config), phase)
        for stop in stops:
            state, _ = steps(state, Source(language), jax.random.key(1), schedule, 0, stop)
            checkpoint.save(tmp_path / str(len(stops)), stop, state)
            state = checkpoint.restore(tmp_path / str(len(stops)), stop, state)
        finals.append(state)
    jax.tree.map(np.testing.assert_array_equal, *finals)
