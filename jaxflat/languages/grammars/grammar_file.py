"""Read and write grammars as text files, one rule a line: `S A 0.5` or `A B C 0.25`.

The probability is the last field. White space separates fields; blank lines are ignored. Symbols
with rules are non-terminals, all others are words. The start symbol is the left side of the first
rule. It alone may have unit rules, `S A 0.5`: they give the probabilities of the roots.
"""

import math
import warnings
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxflat.languages.grammars.grammar import Grammar, level_order, sum_to_one

MAX_SUM_ERROR = 0.01  # largest accepted |sum - 1| of a symbol's probabilities, as in NLTK


class GrammarWarning(UserWarning):
    """A grammar file needs normalising, or has unreachable symbols."""


class _Rule(NamedTuple):
    line: int
    left: str
    right: tuple[str, ...]
    probability: float


def read_grammar(path: str | Path) -> Grammar:
    """Return the grammar of a file.

    Non-terminals are grouped by level, see `level_order`, and ordered within a level by their first
    rules. Words are in the order of their code points. Duplicate rules add up. A symbol that the
    start symbol does not reach is dropped with its rules, with a GrammarWarning. Each symbol's
    probabilities are normalised, so that `math.fsum` gives 1.0. Where a sum is off by more than
    1e-6 per rule, a GrammarWarning names the worst symbol.

    A start symbol that has only unit rules is not a non-terminal of the grammar. Otherwise it is
    itself a root, with the total probability of its other rules.

    Raises ValueError of one line, `<path>:<line>: ...`, if the file is not such a grammar or a sum
    is off by more than 0.01.
    """
    if not str(path):
        raise ValueError("no grammar file is given: set language.grammar_file.path")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    grammar, repairs = _parse(path, content)
    for repair in repairs:
        warnings.warn(repair, GrammarWarning, stacklevel=2)
    return grammar


def write_grammar(path: str | Path, grammar: Grammar) -> None:
    """Write a file from which `read_grammar` restores the same tables, bit for bit.

    Raises ValueError if no file can: a symbol is out of order, unreachable or contains white space.
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
    again, _ = _parse(path, content)
    for field, value in vars(grammar).items():
        if not np.array_equal(value, getattr(again, field)):
            raise ValueError(f"{path}: a file cannot hold this grammar: {field} would change")
    Path(path).write_bytes(content)


def _positive(names: Iterable[str], probs_X: np.ndarray) -> list[tuple[str, float]]:
    return [(name, p) for name, p in zip(names, probs_X.tolist(), strict=True) if p > 0]


class _LineError(Exception):
    """Its arguments: a line number, and the error there."""


def _parse(path: str | Path, content: bytes) -> tuple[Grammar, list[str]]:
    """Return the grammar, and one line for each kind of repair that it needed."""
    try:
        rules = _rules(content)
        _check_rules(rules)
        rules_of: dict[str, list[_Rule]] = {}
        for rule in rules:
            rules_of.setdefault(rule.left, []).append(rule)
        reached = _reachable(rules_of, rules[0].left)
        _check_symbols(rules_of, reached)
    except _LineError as error:
        line, message = error.args
        raise ValueError(f"{path}:{line}: {message}") from None
    repairs = [f"{path}:{line}: {message}" for line, message in _repairs(rules_of, reached)]
    return _grammar([rule for rule in rules if rule.left in reached]), repairs


def _rules(content: bytes) -> list[_Rule]:
    """Return the rules, each line checked by itself."""
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
    """Check every rule, given the set of non-terminals."""
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


def _reachable(rules_of: dict[str, list[_Rule]], start: str) -> set[str]:
    """Return the non-terminals that some chain of rules reaches from the start symbol."""
    reached, queue = {start}, [start]
    for symbol in queue:
        children = {child for rule in rules_of[symbol] for child in rule.right}
        new = (children & rules_of.keys()) - reached
        reached |= new
        queue += new
    return reached


def _check_symbols(rules_of: dict[str, list[_Rule]], reached: set[str]) -> None:
    """Check that every symbol's sum is near 1, and that every reachable one can yield words.

    The error is at the symbol's first line.
    """
    for symbol, own in rules_of.items():
        if round(_sum_error(own), 9) > MAX_SUM_ERROR:
            message = f"the rules of {symbol!r} sum to {_sum(own):.9g}, not to 1"
            raise _LineError(own[0].line, message)
    rules = [rule for own in rules_of.values() for rule in own]
    ending, grown = {rule.right[0] for rule in rules} - rules_of.keys(), True
    while grown:
        more = {rule.left for rule in rules if ending.issuperset(rule.right)} - ending
        ending, grown = ending | more, bool(more)
    for symbol, own in rules_of.items():
        if symbol in reached and symbol not in ending:
            raise _LineError(own[0].line, f"{symbol!r} never ends in words")


def _sum(rules: list[_Rule]) -> float:
    return math.fsum(rule.probability for rule in rules)


def _sum_error(rules: list[_Rule]) -> float:
    return abs(_sum(rules) - 1)


def _repairs(rules_of: dict[str, list[_Rule]], reached: set[str]) -> list[tuple[int, str]]:
    """Return (line, message) of the dropped symbols and of the normalised ones, if any."""
    repairs, start = [], next(iter(rules_of))
    if dropped := [symbol for symbol in rules_of if symbol not in reached]:
        message = f"no rules lead from {start!r} to {', '.join(map(repr, dropped))}: dropped"
        repairs.append((rules_of[dropped[0]][0].line, message))
    kept = [own for symbol, own in rules_of.items() if symbol in reached]
    if off := [own for own in kept if _sum_error(own) > 1e-6 * len(own)]:
        worst = max(off, key=_sum_error)
        message = f"the rules of {worst[0].left!r} sum to {_sum(worst):.9g}, not to 1: normalised"
        of_many = f"; it is the worst of {len(off)} symbols" if len(off) > 1 else ""
        repairs.append((worst[0].line, message + of_many))
    return repairs


def _grammar(rules: list[_Rule]) -> Grammar:
    """Return the tables of checked rules."""
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
