"""A sweep declares its claims before it runs: sweep.json holds them, and they cannot change."""

import json
from pathlib import Path

import pytest

from jaxflat.analysis.plan import UNDECLARED, read_plan
from jaxflat.config import param, product
from jaxflat.config.validation import InputError
from jaxflat.storage.leased_folder import Folder
from jaxflat.sweeps.points import expand
from jaxflat.sweeps.sweep_record import record_sweep
from tests.support.sweeps import tiny_config

SEEDS = param("seed", [0, 1])


def record(workdir: Path, **claims):
    """Record a sweep that declares `claims`, without running it."""
    config = tiny_config()
    config.claims.update(claims)
    record_sweep(config, expand(config, SEEDS, workdir), Folder(workdir))


def test_analysis_reads_the_plan_that_the_sweep_declared(tmp_path):
    record(tmp_path, primary="effect", shots=8, loss_margin=0.2, negligible_slope=0.3)
    plan = read_plan(tmp_path)
    assert (plan.primary, plan.probe, plan.shots) == ("effect", "linear_probe", 8)
    assert (plan.loss_ratio, plan.negligible_slope) == (1.2, 0.3)


@pytest.mark.parametrize(
    ("key", "value"),
    [("primary", "flatness"), ("shots", 8), ("loss_margin", 0.3), ("negligible_slope", 1.0)],
)
def test_a_sweep_that_has_begun_cannot_change_its_claims(tmp_path, key, value):
    record(tmp_path)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(InputError, match=rf"holds a sweep with claims\.{key}=.*claims\.{key}="):
        record(tmp_path, **{key: value})
    assert (tmp_path / "sweep.json").read_bytes() == before
    record(tmp_path)  # the same claims resume


def test_an_older_sweep_without_claims_resumes(tmp_path):
    record(tmp_path)
    path = tmp_path / "sweep.json"
    stored = json.loads(path.read_text())
    del stored["trains"]["claims"]
    path.write_text(json.dumps(stored))
    assert read_plan(tmp_path) == UNDECLARED
    record(tmp_path, primary="flatness")


@pytest.mark.parametrize("content", [None, {"points": []}, {"trains": {"seed": 0}}])
def test_folders_without_a_declaration_have_no_primary_claim(tmp_path, content):
    if content is not None:
        (tmp_path / "sweep.json").write_text(json.dumps(content))
    assert read_plan(tmp_path) == UNDECLARED
    assert UNDECLARED.primary == ""


@pytest.mark.parametrize("key", ["claims.primary", "claims.loss_margin", "claims.shots"])
def test_claims_cannot_be_swept(tmp_path, key):
    values = ["accuracy", "flatness"] if key.endswith("primary") else [8, 16]
    with pytest.raises(InputError, match=rf"^{key} cannot be swept"):
        expand(tiny_config(), product(SEEDS, param(key, values)), tmp_path)


def test_a_claim_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"claims\.primary"):
        record(tmp_path, primary="truth")


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"shots": 7}, r"claims\.shots=7 is not one of probes\.shots=\(8, 16\)"),
        ({"probe": "linear_probe_projected"}, r"needs probes\.projected_dimension"),
    ],
)
def test_an_accuracy_that_is_not_measured_cannot_be_declared(tmp_path, claims, message):
    with pytest.raises(InputError, match=message):
        record(tmp_path, **claims)
