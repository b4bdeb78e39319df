"""Training that is saved and resumed gives the same bits, with every optimizer."""

from itertools import product

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config.base import FLATNESS_PENALTIES
from jaxflat.config.validation import NEED_WHOLE_BATCH
from jaxflat.runs import builders, slots, trajectory
from tests.support.counts import FULL
from tests.support.folders import owned

OPTIMIZERS = [
    n for n, keys in base_config.phase().optimizer.items() if isinstance(keys, ConfigDict)
]
ALWAYS = [
    *(("adamw", "exact", 2, None), ("muon", "sampled", 1, None)),
    ("adamw", "exact", 2, "hessian_max_eigenvalue"),  # it carries a vector from step to step
]
ALL_CASES = [
    *product(OPTIMIZERS, ("exact", "sampled"), (1, 2), (None,)),
    *product(("adamw", "sam"), ("exact",), (1, 2), FLATNESS_PENALTIES),
]
REST = [case for case in ALL_CASES if case not in ALWAYS]


def resolved(optimizer: str, targets: str, together: int, penalty: str | None) -> FrozenConfigDict:
    config = base_config.base()
    config.data_seed = config.init_seed = config.probe_seed = 0
    config.model.update({"width": 8, "num_layers": 2 if optimizer == "muon" else 1})
    config.language.hmm.min_length = 4
    config.phases.pretrain.targets = targets
    config.phases.pretrain.optimizer.name = optimizer
    if penalty:
        chosen = {"measure": penalty, "strength": -1e-4, "num_probes": 2, "max_excess": 5.0}
        config.phases.pretrain.flatness_penalty.update(chosen)
    if penalty not in NEED_WHOLE_BATCH:
        config.phases.pretrain.microbatch_size = 32
    config.training.together = together
    config.mesh.data = 1
    return FrozenConfigDict(config)


@pytest.mark.parametrize(
    ("optimizer", "targets", "together", "penalty"),
    [*ALWAYS, *(REST if FULL else REST[::20])],
)
@pytest.mark.slow
def test_calls_of_any_length_and_stored_in_between_are_the_same_training(
    optimizer, targets, together, penalty, tmp_path
):
    config = resolved(optimizer, targets, together, penalty)
    (phase,) = trajectory.phases(config)
    finals = []
    for stops in ((12,), (5, 6, 12)):
        states = {}
        for slot in range(together):
            seeded = FrozenConfigDict({**config.to_dict(), "init_seed": slot})
            states[slot] = builders.init_state(builders.init_params(seeded), phase)
        for stop in stops:
            calls = {
                slot: slots.Call(config, phase, state, stop, 0, "trunk")
                for slot, state in states.items()
            }
            for slot, outcome in slots.run_calls(calls).items():
                with owned(tmp_path / f"{len(stops)}_{slot}") as folder:
                    folder.save(stop, outcome.state)
                    states[slot] = folder.restore(stop, outcome.state)
        finals.append(states)
    jax.tree.map(np.testing.assert_array_equal, *finals)
