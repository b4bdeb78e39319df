"""The predicted drift against its closed form, and where theory does not predict it."""

import pytest
from ml_collections import ConfigDict

from jaxflat import config as base_config
from jaxflat.runs.drift import predicted_drift


def noisy_sgd() -> tuple[ConfigDict, ConfigDict]:
    """Return the sections of a language and of a phase of SGD at .1 on 8 sampled words a step."""
    phase = base_config.phase()
    phase.optimizer.name, phase.targets = "sgd", "sampled"
    phase.update({"steps": 1000, "batch_size": 8})
    phase.schedule.update({"learning_rate": 0.1, "warmup_steps": 0})
    return base_config.base().language, phase


def test_at_a_constant_rate_it_is_eta_squared_k_over_b():
    language, phase = noisy_sgd()
    assert predicted_drift(language, phase) == pytest.approx(0.1**2 * 1000 / 8, rel=1e-6)
    phase.microbatch_size = 4  # the step is the same
    assert predicted_drift(language, phase) == pytest.approx(0.1**2 * 1000 / 8, rel=1e-6)


def test_a_linear_warm_up_counts_by_the_sum_of_squares():
    language, phase = noisy_sgd()
    W = 400
    phase.schedule.update({"warmup_steps": W})
    rising = W * (W + 1) * (2 * W + 1) / 6 / W**2  # sum of (s / W)^2 for s = 1..W
    assert predicted_drift(language, phase) == pytest.approx(0.01 * (rising + 600) / 8, rel=1e-5)


def test_exact_targets_have_no_noise():
    language, phase = noisy_sgd()
    phase.targets = "exact"
    assert predicted_drift(language, phase) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("phase.optimizer.name", "adamw"),
        ("phase.optimizer.sgd.momentum", 0.9),
        ("phase.flatness_penalty.strength", 1e-4),
        ("phase.adversary.strength", 1e-4),
        ("language.masking", "share"),
        ("language.stored_sentences", 1000),
    ],
)
def test_it_is_not_predicted_where_the_theory_does_not_hold(key, value):
    language, phase = noisy_sgd()
    sections = ConfigDict({"language": language, "phase": phase})
    sections.update_from_flattened_dict({key: value})
    assert predicted_drift(sections.language, sections.phase) is None
