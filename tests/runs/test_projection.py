"""Projections of checkpoints, and shared prefixes of the points of a sweep."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from jaxflat.config import param, product
from jaxflat.config.validation import InputError
from jaxflat.languages.batches import Source
from jaxflat.runs import builders, slots, trajectory
from jaxflat.runs.languages import make_language
from jaxflat.runs.trajectory import Checkpoint
from jaxflat.sweeps import points, sweep
from jaxflat.training.optimizers import Schedule
from tests.support.sweeps import tiny_config
from tests.sweeps.test_sweep import assert_same, contents

pytestmark = pytest.mark.slow

ARMS = product(param("seed", [0]), param("phases.drift.targets", ["sampled", "exact"]))


def arms_config():
    config = tiny_config()
    config.flatness.measures = ("fisher_trace",)
    return config


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """A finished sweep of two arms with the same first phase."""
    workdir = tmp_path_factory.mktemp("arms")
    assert sweep.run(arms_config(), ARMS, workdir) == {}
    return workdir


def rows_of(workdir):
    with (workdir / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_projection_is_its_checkpoint_trained_on_by_adamw_on_exact_targets(arms):
    point = points.expand(arms_config(), ARMS, arms)[0]
    config = point.config
    drift = trajectory.phases(config)[1]
    template = builders.init_params(config)
    start, projected = (
        jax.device_get((point.folder / name).restore(16, template))
        for name in ("checkpoints", "projected")
    )
    # By hand: what the pretrain phase does with AdamW, from a fresh state, one step a call.
    settings = config.phases.pretrain
    assert (settings.targets, settings.optimizer.name) == ("exact", "adamw")
    mesh = builders.make_mesh(config)
    steps = builders.train_steps(config, settings, mesh)
    params = jax.tree.map(jnp.asarray, start)
    state = builders.init_state(params, drift._replace(start=16, settings=settings))
    key = builders.purpose_key(0, "train/drift/projection")
    source = Source(make_language(config.language))
    learning_rate = drift.settings.projection.learning_rate
    for stop in (17, 18, 19):
        schedule = Schedule(learning_rate, 0, 3, 3)
        state, _ = steps(state, source, key, schedule, 16, stop)
    jax.tree.map(np.testing.assert_array_equal, state.params, projected)
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), start, projected)
    assert all(jax.tree.leaves(differ))


def test_results_hold_a_checkpoint_and_its_projection_side_by_side(arms):
    rows = [row for row in rows_of(arms) if row["phases.drift.targets"] == "sampled"]
    columns = ("step", "projected", "last", "sentences_seen")
    where = [tuple(row[column] for column in columns) for row in rows]
    unprojected = [("7", "0", "0", "56"), ("14", "0", "0", "112"), ("16", "0", "1", "128")]
    assert where == [*unprojected, ("16", "1", "1", str(128 + 3 * 8))]
    raw, projected = rows[-2:]
    for column in ("excess_loss", "fisher_trace"):
        assert float(raw[column]) != float(projected[column])
    assert raw["bayes/state_2.map"] == projected["bayes/state_2.map"] == "1.0"


def phases_of_calls(monkeypatch) -> list[str]:
    """Return a list to which each later call of training adds its phase."""
    trained, advance = [], slots.run_calls

    def count(calls):
        trained.extend(call.phase.name for call in calls.values())
        return advance(calls)

    monkeypatch.setattr(slots, "run_calls", count)
    return trained


def test_arms_share_what_they_begin_with_and_lose_no_bit(arms, tmp_path, monkeypatch):
    """Compared with each arm in a separate folder, without a shared prefix to copy."""
    assert len(list((arms / "trunks").iterdir())) == 1
    for place, point in enumerate(points.expand(arms_config(), ARMS, tmp_path)):
        assert sweep.run(arms_config(), ARMS, tmp_path, selection=str(place)) == {}
        shutil.rmtree(tmp_path / "trunks")
        assert point.folder.path.is_dir()
    assert_same(arms, tmp_path)
    trained = phases_of_calls(monkeypatch)
    more = product(param("seed", [0]), param("phases.drift.steps", [8]))
    again = tmp_path / "again"
    shutil.copytree(arms / "trunks", again / "trunks")
    assert sweep.run(arms_config(), more, again, stages=("train",)) == {}
    # The anneal that leaves at the end of the shared phase is not in the shared prefix.
    assert trained[:4] == ["pretrain"] * 4  # a call for each step
    assert set(trained[4:]) == {"drift", "drift/projection"}


def test_a_point_whose_last_phase_another_went_on_from_trains_no_phase(tmp_path, monkeypatch):
    config = arms_config()
    config.phases.off = config.phases.drift.copy_and_resolve_references()
    config.phases.off.checkpoint_steps = config.phases.off.projection.checkpoint_steps = ()
    both = param("phase_order", [("pretrain", "drift", "off"), ("pretrain", "drift")])
    short = points.expand(config, both, tmp_path / "alone")[1]
    assert sweep.run(config, both, tmp_path / "alone", selection="1") == {}
    assert sweep.run(config, both, tmp_path / "both", selection="0") == {}
    trained = phases_of_calls(monkeypatch)
    assert sweep.run(config, both, tmp_path / "both", selection="1") == {}
    assert set(trained) == {"drift/projection"}  # what branches off at its end
    for name in ("metrics.jsonl", "evaluation.jsonl", "flatness.jsonl", "probes.jsonl"):
        alone, after = (tmp_path / where / short.name / name for where in ("alone", "both"))
        assert alone.read_bytes() == after.read_bytes()


def test_points_that_begin_differently_share_nothing(arms, tmp_path):
    other = product(param("seed", [1]), param("phases.drift.targets", ["sampled"]))
    shutil.copytree(arms / "trunks", tmp_path / "trunks")
    assert sweep.run(arms_config(), other, tmp_path, stages=("train",)) == {}
    assert len(list((tmp_path / "trunks").iterdir())) == 2


def test_new_projections_in_an_old_folder_are_refused(arms):
    before = contents(arms)
    config = arms_config()
    config.phases.drift.projection.checkpoint_steps = ()
    with pytest.raises(
        InputError, match=r"phases\.drift\.projection\.checkpoint_steps=\[6\].*=\[\]"
    ):
        sweep.run(config, ARMS, arms)
    assert contents(arms) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"checkpoint_steps": (5,)},
            r"phases\.drift\.projection\.checkpoint_steps: 5 is not one of "
            r"phases\.drift\.checkpoint_steps=\(6,\)",
        ),
        ({"steps": 0}, r"phases\.drift\.projection\.steps=0 must be at least 1"),
        ({"learning_rate": 0.0}, r"projection\.learning_rate=0\.0 must be"),
    ],
)
def test_wrong_projections_are_named(values, message, tmp_path):
    config = arms_config()
    config.phases.drift.projection.update(values)
    with pytest.raises(InputError, match=message):
        points.expand(config, ARMS, tmp_path)


def test_a_projection_must_split_over_the_devices_too(tmp_path):
    config = arms_config()
    config.mesh.data = 2
    config.phases.drift.projection.batch_size = 9
    with pytest.raises(InputError, match=r"phases\.drift\.projection\.batch_size=9 is not"):
        points.expand(config, ARMS, tmp_path)


def test_a_run_without_phases_has_one_checkpoint():
    config = FrozenConfigDict(json.loads(json.dumps({"phase_order": []})))
    assert trajectory.measured_checkpoints(config) == [Checkpoint(0)]
