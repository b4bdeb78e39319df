"""What a run's stage measures: every measure raw, and as seen in the sweep's widest model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import tiny_config

from jaxflat import experiment, points
from jaxflat.config import MEASURES
from jaxflat.flatness import Estimate, Measured, mean_loss
from jaxflat.stages import flatness as stage
from jaxflat.trajectory import Snapshot

CHEAP = {
    "num_microbatches": 6,
    "microbatch_size": 2,
    "num_probes": 1,
    "eigenvalues.num_largest": 1,
    "eigenvalues.num_steps": 3,
    "density.num_steps": 3,
    "density.num_probes": 2,
    "learning_coefficient.num_burnin": 2,
    "learning_coefficient.num_draws": 8,
}


def measured(tmp_path, measure, embedded_width):
    """Return what the stage makes of a measure at the initial parameters, of width 8."""
    config = tiny_config()
    config.flatness.update_from_flattened_dict(CHEAP)
    config.flatness.update(measures=(measure,), embedded_width=embedded_width)
    (point,) = points.expand(config, [{}], tmp_path)
    return stage.measure_both(
        point.config, experiment.init_params(point.config), measure, Snapshot(14)
    )


def test_embedded_values_are_of_the_wider_model_that_computes_the_same(tmp_path, monkeypatch):
    def loss_and_size(problem, settings):
        loss = mean_loss(problem.loss_fn, problem.params, problem.sample(0))
        size = jnp.float32(sum(leaf.size for leaf in jax.tree.leaves(problem.params)))
        return Measured({"loss": loss, "size": Estimate(size, size, 6, "sentences")})

    monkeypatch.setitem(stage.MEASURES, "average_sharpness", loss_and_size)
    found = measured(tmp_path, "average_sharpness", embedded_width=24)
    assert set(found) == {"loss", "size", "loss@embedded", "size@embedded"}
    for name in ("mean", "sem"):
        raw, embedded = (getattr(found[key], name) for key in ("loss", "loss@embedded"))
        np.testing.assert_allclose(embedded, raw, rtol=1e-4)
    assert found["size@embedded"].mean > 5 * found["size"].mean


@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_has_embedded_values_where_there_is_a_common_width(tmp_path, measure):
    found = measured(tmp_path, measure, embedded_width=16)
    raw = {name for name in found if not name.endswith("@embedded")}
    # Blocks of a trace are of the model itself.
    whole = {measure} if measure.endswith("_trace") else raw
    assert found.keys() - raw == {f"{name}@embedded" for name in whole}
    assert all(np.isfinite(estimate.mean) for estimate in found.values())
    assert any(found[f"{name}@embedded"].mean != found[name].mean for name in whole)
    same = measured(tmp_path, measure, embedded_width=8)
    assert same.keys() == found.keys()
    for name in whole:
        assert same[f"{name}@embedded"].mean == same[name].mean == found[name].mean
