"""The languages of the scales `gpu` and `paper`: as large as those of Liu et al. (2023).

They are random ones. Their concentrations bring the optimum of the loss near the published
one. docs/scaling.md has the figures, which `--dry_run` prints.
"""

from typing import Any


def paper_grammar() -> dict[str, Any]:
    """Return keys of `language`: 49 non-terminals and a start symbol, 200 words, length <= 32.

    Few symbols of the inner levels become words, so most sentences have nodes above 16 and 8 words.
    """
    sizes = {"level_sizes": (9, 8, 8, 8, 8, 8), "num_words": 200, "length": 32, "min_length": 5}
    rules = {"emission_probability": 0.02, "rule_concentration": 0.015}
    tasks = ((), (0, 16), (0, 8))
    pcfg = {**sizes, **rules, "emission_concentration": 0.045, "tasks": tasks}
    return {"name": "pcfg", "pcfg": pcfg}


def paper_hmm() -> dict[str, Any]:
    """Return keys of `language`: 100 states, 200 words, length 16."""
    sizes = {"num_states": 100, "num_words": 200, "length": 16, "min_length": 16}
    rows = {"transition_concentration": 0.03, "emission_concentration": 0.045}
    return {"name": "hmm", "hmm": {**sizes, **rows, "tasks": (6, 10)}}
