"""Grammars as text, one rule a line: `S A 0.5` or `A B C 0.25`, the probability last.

Fields are separated by white space; blank lines mean nothing. A symbol on some line's left is a
non-terminal, every other one a word. The first line's left symbol is the start symbol; it alone may
have rules with a single non-terminal on the right, and says with them what the root is.
"""

import math
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxflat.languages.grammars.grammar import Grammar, level_order, sum_to_one


class _Rule(NamedTuple):
    line: int
    left: str
    right: tuple[str, ...]
    probability: float


def read_grammar(path: str | Path) -> Grammar:
    """The grammar of a file; ValueError of one line, `<path>:<line>: ...`, where it is none.

    Non-terminals are in the order of their first rules, grouped by level where there are levels;
    words are in the order of their code points. A rule written twice counts twice. Each symbol's
    probabilities must sum to 1 up to 1e-6 per rule, and are then made to: `math.fsum` gives 1.0.

    A start symbol without rules to words or pairs is no non-terminal of the grammar. Otherwise it
    is a root itself, with the probability of all those rules together.
    """
    if not str(path):
        raise ValueError("no grammar file is given: set language.grammar_file.path")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return _parse(path, content)


def write_grammar(path: str | Path, grammar: Grammar) -> None:
    """Write a file from which `read_grammar` makes the same tables, bit for bit.

    ValueError where there is none: a symbol out of order, out of reach or with white space in it.
    """
    start = "S"
    while start in grammar.nonterminals + grammar.words:
        start += "'"
    lines = [f"{start} {A} {p!r}" for A, p in _positive(grammar.nonterminals, grammar.start_N)]
    pairs = [f"{B} {C}" for B in grammar.nonterminals for C in grammar.nonterminals]
    for A, name in enumerate(grammar.nonterminals):
        probs_P, probs_V = grammar.rules_NxNxN[A].ravel(), grammar.emissions_NxV[A]
        for right, p in [*_positive(pairs, probs_P), *_positive(grammar.words, probs_V)]:
            lines.append(f"{name} {right} {p!r}")
    content = "\n".join([*lines, ""]).encode()
    again = _parse(path, content)
    for field, value in vars(grammar).items():
        if not np.array_equal(value, getattr(again, field)):
            raise ValueError(f"{path}: a file cannot hold this grammar: {field} would change")
    Path(path).write_bytes(content)


def _positive(names: Iterable[str], probs_X: np.ndarray) -> list[tuple[str, float]]:
    return [(name, p) for name, p in zip(names, probs_X.tolist(), strict=True) if p > 0]


class _LineError(Exception):
    """(line number, what is wrong there)."""


def _parse(path: str | Path, content: bytes) -> Grammar:
    try:
        rules = _rules(content)
        _check_rules(rules)
        _check_symbols(rules)
    except _LineError as error:
        line, message = error.args
        raise ValueError(f"{path}:{line}: {message}") from None
    return _grammar(rules)


def _rules(content: bytes) -> list[_Rule]:
    """Every line by itself."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _LineError(content.count(b"\n", 0, error.start) + 1, "not UTF-8 text") from error
    rules = []
    for line, fields in enumerate(map(str.split, text.split("\n")), start=1):
        if not fields:
            continue
        if not 3 <= len(fields) <= 4:
            raise _LineError(line, f"a rule has 3 or 4 fields; this line has {len(fields)}")
        left, *right, last = fields
        try:
            probability = float(last)
        except ValueError:
            probability = math.nan
        if not 0 < probability <= 1:
            raise _LineError(line, f"a probability is above 0 and at most 1; got {last!r}")
        rules.append(_Rule(line, left, tuple(right), probability))
    if not rules:
        raise _LineError(1, "no rules")
    return rules


def _check_rules(rules: list[_Rule]) -> None:
    """Every rule, given which symbols are non-terminals."""
    start, lefts = rules[0].left, {rule.left for rule in rules}
    start_has_units = any(rule.left == start and _is_unit(rule, lefts) for rule in rules)
    for line, left, right, _ in rules:
        if left != start and len(right) == 1 and right[0] in lefts:
            raise _LineError(line, f"only the start symbol {start!r} may become one non-terminal")
        for symbol in right:
            if len(right) == 2 and symbol not in lefts:
                raise _LineError(line, f"{symbol!r} is in a pair but has no rules")
            if symbol == start and start_has_units:
                raise _LineError(line, f"the start symbol {start!r} cannot be on the right")


def _is_unit(rule: _Rule, lefts: Container[str]) -> bool:
    return len(rule.right) == 1 and rule.right[0] in lefts


def _check_symbols(rules: list[_Rule]) -> None:
    """Every non-terminal: its probabilities, that it can end in words, that the start leads to it.

    A symbol that fails is reported at its first line.
    """
    rules_of: dict[str, list[_Rule]] = {}
    for rule in rules:
        rules_of.setdefault(rule.left, []).append(rule)
    for symbol, own in rules_of.items():
        total = math.fsum(rule.probability for rule in own)
        if abs(total - 1) > 1e-6 * len(own):
            raise _LineError(own[0].line, f"the rules of {symbol!r} sum to {total:.9g}, not to 1")
    ending, grown = {rule.right[0] for rule in rules} - rules_of.keys(), True
    while grown:
        more = {rule.left for rule in rules if ending.issuperset(rule.right)} - ending
        ending, grown = ending | more, bool(more)
    reached = [rules[0].left]
    for symbol in reached:
        children = {child for rule in rules_of[symbol] for child in rule.right}
        reached += (children & rules_of.keys()).difference(reached)
    for symbol, own in rules_of.items():
        if symbol not in ending:
            raise _LineError(own[0].line, f"{symbol!r} never ends in words")
        if symbol not in reached:
            raise _LineError(own[0].line, f"{symbol!r} cannot come from the start symbol")


def _grammar(rules: list[_Rule]) -> Grammar:
    """Tables of checked rules."""
    start, lefts = rules[0].left, {rule.left: None for rule in rules}
    units = [rule for rule in rules if rule.left == start and _is_unit(rule, lefts)]
    others = [rule for rule in rules if rule.left != start or not _is_unit(rule, lefts)]
    names = list(dict.fromkeys(rule.left for rule in others))
    words = sorted({rule.right[0] for rule in others if len(rule.right) == 1})
    place = {symbol: i for symbols in (names, words) for i, symbol in enumerate(symbols)}
    N = len(names)
    start_N, table = np.zeros(N), np.zeros((N, N * N + len(words)))
    for _, left, right, probability in others:
        pair = place[right[0]] * N + place[right[1]] if len(right) == 2 else N * N + place[right[0]]
        table[place[left], pair] += probability
        if left == start:
            start_N[place[start]] += probability
    for rule in units:
        start_N[place[rule.right[0]]] += rule.probability
    table = np.stack([sum_to_one(row) for row in table])
    return level_order(
        Grammar(
            nonterminals=tuple(names),
            words=tuple(words),
            start_N=sum_to_one(start_N),
            rules_NxNxN=table[:, : N * N].reshape(N, N, N),
            emissions_NxV=table[:, N * N :],
            levels=(N,),
        )
    )
