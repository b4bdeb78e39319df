"""The scale `paper` of every shipped config is within the ranges of Liu et al. (2023)."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config, loading
from jaxflat.runs import builders, trajectory
from jaxflat.runs.language_figures import LanguageFigures, measure_language
from jaxflat.runs.languages import language_kind, make_language
from jaxflat.runs.run import Point
from jaxflat.sweeps import points

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.py"))

WORDS_AND_LENGTH = {"pcfg": (200, 32), "hmm": (200, 16), "generated": (2000, 24)}
SYMBOLS = {"pcfg": 49, "hmm": 100}  # of a grammar, besides the start symbol
OPTIMUM = {"pcfg": (3.1, 3.3), "hmm": (3.65, 3.85)}  # nats; published: 3.196 and 3.758
CONTEXT = {"pcfg": (1.0, 1.6), "hmm": (1.4, 1.6)}  # nats that context gives
MOST_BAYES, LEAST_GAIN, LEAST_EXISTS = 0.99, 0.1, 0.7  # a task's accuracies and share
PARAMETERS = (2.9e6, 7.4e8)
BATCH = 4096  # sentences, but not of plain SGD: its batch decides the drift


def faults(name: str, figures: LanguageFigures) -> Iterator[str]:
    """Yield the figures of a language that are outside the ranges of its kind."""
    for ranges, figure in ((OPTIMUM, "conditional"), (CONTEXT, "context")):
        low, high = ranges.get(name, (0, 0))
        if not low <= float(getattr(figures, figure).mean) <= high:
            yield figure
    for task, one in figures.tasks.items():
        bayes, majority, exists = (float(estimate.mean) for estimate in one)
        if not majority + LEAST_GAIN <= bayes < MOST_BAYES:
            yield f"accuracy of {task}"
        if exists < LEAST_EXISTS:
            yield f"share of {task}"


@cache
def figures_of(section: Config) -> LanguageFigures:
    """Return the figures of masked words; a causal model's language has the same sentences."""
    key = builders.purpose_key(section.seed, "figures")
    return measure_language(make_language(section), "one", key, num_sentences=1024)


@pytest.fixture
def paper_points(request, monkeypatch) -> list[Point]:
    config, listed = loading.load(f"{CONFIGS}/{request.param}.py:paper")
    if config.language.name == "generated":  # its teacher is not here
        monkeypatch.setattr("jaxflat.runs.checks.check_config", lambda config: None)
    return points.expand(config, listed, Path("unused"))


every_config = pytest.mark.parametrize("paper_points", SHIPPED, indirect=True)


@pytest.mark.slow
@every_config
def test_languages_are_the_papers(paper_points):
    for section in {point.config.language for point in paper_points}:
        kind = language_kind(section)
        assert kind.sizes(section) == WORDS_AND_LENGTH[section.name]
        if kind.has_tasks:
            assert make_language(section).num_symbols == SYMBOLS[section.name]
            assert not [*faults(section.name, figures_of(section))]


@pytest.mark.slow
@every_config
def test_models_and_batches_are_the_papers(paper_points):
    for point in paper_points:
        for phase in trajectory.phases(point.config):
            low, high = PARAMETERS
            assert low <= builders.num_params(point.config) <= high
            assert phase.settings.optimizer.name == "sgd" or phase.settings.batch_size == BATCH


LITTLE_CONTEXT = {"transition_concentration": 0.7, "emission_concentration": 0.05}
REFUSED = [
    (LITTLE_CONTEXT, ["conditional", "context"]),
    ({"emission_concentration": 0.06}, ["conditional"]),
    ({"emission_concentration": 0.02, "transition_concentration": 0.003}, ["accuracy of state_6"]),
    ({"emission_concentration": 100.0}, ["accuracy of state_6", "accuracy of state_10"]),
    ({"min_length": 1}, ["share of state_6", "share of state_10"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changed", "expected"), REFUSED)
def test_other_languages_are_refused(changed, expected):
    section = base_config.base().language
    section.update(base_config.paper_hmm())
    assert not [*faults("hmm", figures_of(FrozenConfigDict(section)))]
    section.hmm.update(changed)
    assert {*expected} <= {*faults("hmm", figures_of(FrozenConfigDict(section)))}
