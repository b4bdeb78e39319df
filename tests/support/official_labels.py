"""Labels of spans by NLTK's chart parser: the symbol of greatest inside probability.

The inside probability of a symbol over a span is the sum over all its derivations of these words.
It ignores the words around them. It is summed over a chart's complete edges and their child
pointers. A label by it is neither the symbol that made the words nor the most probable one given
the sentence.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import nltk
import numpy as np
from nltk.parse.chart import BottomUpLeftCornerChartParser, TreeEdge

from jaxflat.languages.grammars.grammar import Grammar


class OfficialLabels(NamedTuple):
    """labels_B int, -1 where invalid; margins_B: log(best / second best), inf if there is none."""

    labels_B: np.ndarray
    margins_B: np.ndarray


def official_labels(
    grammar: Grammar,
    sentences: Sequence[Sequence[int]],
    place: tuple[int, int] | str,
    min_length: int = 4,
    max_length: int = 32,
) -> OfficialLabels:
    """The place is "root", or the span (start, end) of words start .. end - 1.

    "root" compares the symbols with a unit rule from the start, without that rule's probability; a
    span all non-terminals. Invalid are sentences of no more than min_length words or no fewer than
    max_length, spans beyond their end, and places that no symbol can derive.
    """
    parser = BottomUpLeftCornerChartParser(nltk_grammar(grammar), max_time=None)
    candidates = [A for A, p in enumerate(grammar.start_N) if p > 0 or place != "root"]
    labels, margins = [], []
    for sentence in sentences:
        span = (0, len(sentence)) if isinstance(place, str) else place
        label, margin = -1, math.inf
        if min_length < len(sentence) < max_length and span[1] <= len(sentence):
            probs = inside(parser, [grammar.words[v] for v in sentence[slice(*span)]])
            best, *others = sorted(candidates, key=lambda A: -probs[A])
            if probs[best] > 0:
                label = best
                if others and probs[others[0]] > 0:
                    margin = math.log(probs[best] / probs[others[0]])
        labels.append(label)
        margins.append(margin)
    return OfficialLabels(np.array(labels), np.array(margins))


def nltk_grammar(grammar: Grammar) -> nltk.PCFG:
    """Start -> A by start_N, A -> rule of A with probability 1, rule of A -> B C or a word.

    With the step in between, the chart has one edge for A over a span. Without it, each rule of A
    would have an edge and meet every edge of its neighbour.
    """
    N = range(len(grammar.nonterminals))
    start = nltk.Nonterminal(("start", 0))
    symbols = [nltk.Nonterminal(("symbol", A)) for A in N]
    bodies = [nltk.Nonterminal(("rule", A)) for A in N]
    rules: list[Any] = [(symbols[A], [bodies[A]], 1.0) for A in N]
    for A in np.flatnonzero(grammar.start_N):
        rules.append((start, [symbols[A]], grammar.start_N[A]))
    for A, B, C in np.argwhere(grammar.rules_NxNxN):
        rules.append((bodies[A], [symbols[B], symbols[C]], grammar.rules_NxNxN[A, B, C]))
    for A, v in np.argwhere(grammar.emissions_NxV):
        rules.append((bodies[A], [grammar.words[v]], grammar.emissions_NxV[A, v]))
    return nltk.PCFG(start, [nltk.ProbabilisticProduction(a, r, prob=p) for a, r, p in rules])


def inside(parser: BottomUpLeftCornerChartParser, words: list[str]) -> dict[int, float]:
    """P(A yields exactly these words) by non-terminal A, zeros among them.

    Summed over complete edges, children before parents: shorter spans first, and within one the
    rules, the symbols, the start.
    """
    probs: dict[int, float] = defaultdict(float)
    try:
        chart = parser.chart_parse(words)
    except ValueError:  # a word that no rule emits
        return probs
    production = {(p.lhs(), p.rhs()): p.prob() for p in parser.grammar().productions()}
    complete = [e for e in chart.edges() if isinstance(e, TreeEdge) and e.is_complete()]
    kinds = ("rule", "symbol", "start")
    of_edge: dict[Any, float] = {}
    for edge in sorted(complete, key=lambda e: (e.length(), kinds.index(e.lhs().symbol()[0]))):
        kind, A = edge.lhs().symbol()
        of_edge[edge] = production[edge.lhs(), edge.rhs()] * sum(
            math.prod(of_edge.get(child, 1.0) for child in children)  # words are certain
            for children in chart.child_pointer_lists(edge)
        )
        if kind == "symbol" and edge.span() == (0, len(words)):
            probs[A] += of_edge[edge]
    return probs
