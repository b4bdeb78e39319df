"""Random languages: proper distributions, and one clear line for bad arguments."""

import jax
import numpy as np
import pytest

from jaxflat.languages import LANGUAGES
from jaxflat.languages.grammars.grammar import random_levelled_grammar
from jaxflat.languages.grammars.grammar_file import write_grammar

KEYWORDS = {
    "hmm": {
        "num_states": 10,
        "num_words": 24,
        "length": 8,
        "min_length": 4,
        "transition_concentration": 0.5,
        "emission_concentration": 0.1,
        "tasks": (3, 6),
    },
    "balanced_tree": {
        "depth": 3,
        "num_states": 4,
        "num_words": 16,
        "rule_concentration": 0.1,
        "emission_concentration": 0.1,
        "tasks": ((0, 8), (4, 8)),
    },
    "pcfg": {
        "level_sizes": (2, 3, 3, 3),
        "num_words": 12,
        "length": 8,
        "min_length": 2,
        "emission_probability": 0.3,
        "rule_concentration": 0.1,
        "emission_concentration": 0.1,
        "tasks": ((), (0, 3)),
    },
    "recursive_pcfg": {
        "num_nonterminals": 6,
        "num_words": 12,
        "length": 7,
        "min_length": 2,
        "emission_probability": 0.5,
        "rule_concentration": 0.1,
        "emission_concentration": 0.1,
        "tasks": ((0, 3),),
    },
    "dyck": {"length": 8, "min_length": 4, "tasks": (2, 6)},
}
ERRORS = [
    ("hmm", {"num_states": 1}, "num_states and num_words must be >= 2; got 1, 24"),
    ("hmm", {"min_length": 9}, r"min_length must be in 1..length=8; got 9"),
    ("hmm", {"min_length": 0}, r"min_length must be in 1..length=8; got 0"),
    ("hmm", {"transition_concentration": 0.0}, r"transition_concentration .* > 0; got 0.0, 0.1"),
    ("hmm", {"tasks": (3, 9)}, r"tasks must be positions in 1..length=8; got 9"),
    ("hmm", {"tasks": (0,)}, r"tasks must be positions in 1..length=8; got 0"),
    ("balanced_tree", {"depth": 0}, r"depth must be >= 1 .*; got 0"),
    ("balanced_tree", {"num_words": 1}, "num_states and num_words must be >= 2; got 4, 1"),
    ("balanced_tree", {"emission_concentration": -1.0}, r"emission_concentration .* > 0; got"),
    ("balanced_tree", {"tasks": ((0, 3),)}, r"tasks must be spans of nodes.*got \(0, 3\)"),
    ("balanced_tree", {"tasks": ((2, 6),)}, r"tasks must be spans of nodes.*got \(2, 6\)"),
    ("balanced_tree", {"tasks": ((8, 16),)}, r"tasks must be spans of nodes.*got \(8, 16\)"),
    (
        "recursive_pcfg",
        {"num_nonterminals": 1},
        "num_nonterminals and num_words must be >= 2; got 1, 12",
    ),
    ("recursive_pcfg", {"min_length": 8}, r"min_length must be in 1..length=7; got 8"),
    (
        "recursive_pcfg",
        {"emission_probability": 1.0},
        "emission_probability must be between 0 and 1; got 1",
    ),
    ("recursive_pcfg", {"rule_concentration": 0.0}, r"rule_concentration .* > 0; got 0.0, 0.1"),
    (
        "recursive_pcfg",
        {"tasks": ((3, 3),)},
        r"tasks must be .* 0 <= start < end <= length=7; got \(3,",
    ),
    (
        "recursive_pcfg",
        {"tasks": ((0, 8),)},
        r"tasks must be .* 0 <= start < end <= length=7; got \(0,",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), ERRORS)
def test_bad_arguments_are_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        LANGUAGES[name](0, **(KEYWORDS[name] | change))


@pytest.mark.parametrize("name", ["hmm", "balanced_tree", "pcfg", "recursive_pcfg"])
def test_seeds_make_distributions(name):
    language, other = (LANGUAGES[name](seed, **KEYWORDS[name]) for seed in (0, 1))
    if name == "hmm":
        totals = [language.transitions_KxK.sum(1), language.emissions_KxV.sum(1)]
    elif name == "balanced_tree":
        totals = [language.rules_LxKxKxK.sum((2, 3)).ravel(), language.emissions_KxV.sum(1)]
    else:
        totals = [language.rules_NxNxN.sum((1, 2)) + language.emissions_NxV.sum(1)]
    rows = language.num_symbols * (language.depth if name == "balanced_tree" else 1)
    assert len(totals[0]) == rows
    grammar = name.endswith("pcfg")
    for total in (*totals, (language.start_N if grammar else language.start_K).sum()):
        np.testing.assert_allclose(total, 1, rtol=1e-5)
    emissions = "emissions_NxV" if grammar else "emissions_KxV"
    assert np.abs(getattr(language, emissions) - getattr(other, emissions)).max() > 0.1


def test_a_grammar_file_is_the_language_it_was_written_from(tmp_path):
    settings = {
        k: v for k, v in KEYWORDS["pcfg"].items() if k not in ("length", "min_length", "tasks")
    }
    write_grammar(tmp_path / "grammar.txt", random_levelled_grammar(0, **settings))
    bounds = {"length": 8, "min_length": 2, "tasks": ((), (0, 3))}
    read = LANGUAGES["grammar_file"](5, path=str(tmp_path / "grammar.txt"), **bounds)
    made = LANGUAGES["pcfg"](0, **KEYWORDS["pcfg"])
    key = jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, made.sample(key, 50), read.sample(key, 50))


@pytest.mark.parametrize("name", KEYWORDS)
def test_tasks_may_come_from_json(name):
    """Lists, as in a config read from a file, make an equal language."""
    as_lists = [list(t) if isinstance(t, tuple) else t for t in KEYWORDS[name]["tasks"]]
    language = LANGUAGES[name](0, **(KEYWORDS[name] | {"tasks": as_lists}))
    same = LANGUAGES[name](0, **KEYWORDS[name])
    assert list(language.tasks) == list(same.tasks)
    hash(tuple(task.place for task in language.tasks.values()))
