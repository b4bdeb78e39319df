"""Labels by NLTK's chart parser, in plain Python, as in the code of Liu et al. (2023)."""

from typing import Any

import nltk
import numpy as np
from nltk.parse.chart import ChartParser, TreeEdge


class NltkLabeler:
    """The most probable root of a whole sentence, for a language of grammar tables.

    The parser gets one production for each rule. We sum a chart's complete edges from the shortest
    to the longest. An edge's probability is a sum over its lists of children: its production's
    probability times the children's.
    """

    def __init__(self, language: Any):
        symbols = [nltk.Nonterminal(A) for A in range(language.num_symbols)]
        self._probs: dict[tuple[Any, Any], float] = {}
        rules_NxNxN, emissions_NxV = map(np.asarray, (language.rules_NxNxN, language.emissions_NxV))
        for A, B, C in np.argwhere(rules_NxNxN).tolist():
            self._probs[symbols[A], (symbols[B], symbols[C])] = float(rules_NxNxN[A, B, C])
        for A, v in np.argwhere(emissions_NxV).tolist():
            self._probs[symbols[A], (str(v),)] = float(emissions_NxV[A, v])
        productions = [nltk.Production(left, right) for left, right in self._probs]
        self._roots = set(np.flatnonzero(language.start_N).tolist())
        self._parser = ChartParser(nltk.CFG(symbols[0], productions))

    def label(self, words: list[int]) -> int:
        """Return the root, or -1 if no root yields these words."""
        chart = self._parser.chart_parse([str(word) for word in words])
        complete = [e for e in chart.edges() if isinstance(e, TreeEdge) and e.is_complete()]
        of_edge: dict[Any, float] = {}
        totals: dict[int, float] = {}
        for edge in sorted(complete, key=lambda e: e.length()):
            prob = 0.0
            for children in chart.child_pointer_lists(edge):
                product = self._probs[edge.lhs(), edge.rhs()]
                for child in children:
                    product *= of_edge.get(child, 1.0)  # 1 for a word
                prob += product
            of_edge[edge] = prob
            symbol = edge.lhs().symbol()
            if edge.length() == len(words) and symbol in self._roots:
                totals[symbol] = totals.get(symbol, 0.0) + prob
        return max(sorted(totals), key=totals.__getitem__, default=-1)
