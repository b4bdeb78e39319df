"""A sweep declares its claims before it runs: sweep.json holds them, and they cannot change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict

from jaxflat.analysis.flatness_columns import SHARPNESS
from jaxflat.analysis.plan import UNDECLARED, read_plan
from jaxflat.config import custom, param, product
from jaxflat.config.validation import InputError, validate
from jaxflat.runs.checks import SHARPNESS_MEASURES, check_claims
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
    assert replace(read_plan(tmp_path), penalties={}) == UNDECLARED
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


def expand_with(tmp_path, primary: str, measures: tuple[str, ...], **flatness):
    config = tiny_config()
    config.claims.primary = primary
    config.flatness.update({"measures": measures, "num_microbatches": 6, **flatness})
    return expand(config, SEEDS, tmp_path)


@pytest.mark.parametrize("primary", ["flatness", "effect", "label noise"])
def test_a_claim_on_flatness_that_is_not_measured_cannot_be_declared(tmp_path, primary):
    message = (
        rf"^claims\.primary='{primary}' needs a measure of sharpness, such as hessian_trace; "
        r"flatness\.measures=\('gradient_noise', 'hessian_density'\) has none$"
    )
    with pytest.raises(InputError, match=message):
        expand_with(tmp_path, primary, ("gradient_noise", "hessian_density"))
    expand_with(tmp_path, "accuracy", ("gradient_noise", "hessian_density"))


def test_a_users_own_measure_of_flatness_does_not_count():
    config = tiny_config()
    config.claims.primary = "effect"
    config.flatness.update({"measures": ("own_measure",), "own_measure": custom(own_measure)})
    with pytest.raises(ValueError, match=r"flatness\.measures=\('own_measure',\) has none"):
        check_claims(FrozenConfigDict(validate(config)))


def own_measure(problem):
    raise NotImplementedError


@pytest.mark.parametrize("measure", SHARPNESS_MEASURES)
def test_any_measure_of_sharpness_allows_a_claim_on_flatness(tmp_path, measure):
    expand_with(tmp_path, "flatness", (measure, "gradient_noise"))


def test_no_largest_eigenvalue_is_no_measure_of_sharpness(tmp_path):
    eigenvalues = {"num_largest": 0, "num_smallest": 1, "num_steps": 10}
    with pytest.raises(InputError, match=r"flatness\.measures=\('hessian_eigenvalues',\)"):
        expand_with(tmp_path, "flatness", ("hessian_eigenvalues",), eigenvalues=eigenvalues)


def test_the_measures_of_sharpness_are_those_that_verdicts_compare():
    assert {*SHARPNESS_MEASURES.values()} == SHARPNESS.keys()
