"""Ground truth for small languages, in plain Python: every derivation, one by one."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxflat.languages.balanced_tree import BalancedTree
from jaxflat.languages.dyck import ZeroSum
from jaxflat.languages.grammars.grammar import Grammar, random_levelled_grammar
from jaxflat.languages.grammars.pcfg import Pcfg, make_pcfg
from jaxflat.languages.hmm import Hmm

Nodes = dict[tuple[int, ...], int]  # hidden symbol by place
Words = tuple[int, ...]


class Derivations(NamedTuple):
    """Each with the probability of its hidden part, the symbols above the words, all its nodes."""

    probs_D: np.ndarray
    leaves_DxT: np.ndarray
    nodes: list[Nodes]
    emissions_KxV: np.ndarray

    def weights_D(self, words: tuple[int, ...]) -> np.ndarray:
        return self.probs_D * self.emissions_KxV[self.leaves_DxT, np.array(words)].prod(axis=1)

    def prob(self, words: tuple[int, ...]) -> float:
        return self.weights_D(words).sum()

    def conditional(self, words: tuple[int, ...], t: int, masked: set[int]) -> np.ndarray:
        """p(x_t = v | the unmasked others) by summing over all completions of the masked words."""
        V = self.emissions_KxV.shape[1]
        choices = [range(V) if s == t or s in masked else [w] for s, w in enumerate(words)]
        p_V = np.zeros(V)
        for completion in product(*choices):
            p_V[completion[t]] += self.prob(completion)
        return p_V / p_V.sum()

    def posterior(self, words: tuple[int, ...], place: tuple[int, ...]) -> np.ndarray:
        p_K = np.zeros(len(self.emissions_KxV))
        for weight, nodes in zip(self.weights_D(words), self.nodes, strict=True):
            if place in nodes:
                p_K[nodes[place]] += weight
        return p_K / p_K.sum()


def derivations(language: Hmm | Pcfg | BalancedTree | ZeroSum, length: int) -> Derivations:
    """Enumerate all derivations of `length` words that the language allows."""
    if isinstance(language, ZeroSum):
        found, emissions = list(_zero_sums(length)), np.eye(2)
    elif isinstance(language, Hmm):
        found, emissions = list(_paths(language, length)), language.emissions_KxV
    elif isinstance(language, BalancedTree):
        found, emissions = list(_balanced(language, length)), language.emissions_KxV
    else:
        found, emissions = list(_trees(language, length)), language.emissions_NxV
    probs, leaves, nodes = zip(*found, strict=True)
    return Derivations(np.array(probs), np.array(leaves), list(nodes), np.asarray(emissions))


def _zero_sums(length: int) -> Iterator[tuple[float, Words, Nodes]]:
    """Yield each string as the hidden part of itself."""
    strings = [w for w in product((0, 1), repeat=length) if 2 * sum(w) == length]
    for words in strings:
        yield 1 / len(strings), words, {(t,): sum(words[:t]) for t in range(1, length + 1)}


def _paths(hmm: Hmm, length: int) -> Iterator[tuple[float, tuple[int, ...], Nodes]]:
    for states in product(range(hmm.num_symbols), repeat=length):
        prob = hmm.start_K[states[0]]
        for before, after in pairwise(states):
            prob *= hmm.transitions_KxK[before, after]
        yield prob, states, {(t + 1,): state for t, state in enumerate(states)}


def _balanced(tree: BalancedTree, length: int) -> Iterator[tuple[float, tuple[int, ...], Nodes]]:
    def below(symbol: int, start: int, width: int, level: int):
        here = {(start, start + width): symbol}
        if width == 1:
            yield 1.0, (symbol,), here
            return
        half = width // 2
        for b, c in product(range(tree.num_symbols), repeat=2):
            for p, left, left_nodes in below(b, start, half, level + 1):
                for q, right, right_nodes in below(c, start + half, half, level + 1):
                    prob = tree.rules_LxKxKxK[level, symbol, b, c] * p * q
                    yield prob, left + right, here | left_nodes | right_nodes

    for root in range(tree.num_symbols):
        for prob, leaves, nodes in below(root, 0, length, 0):
            yield tree.start_K[root] * prob, leaves, nodes


def _trees(grammar: Pcfg, length: int) -> Iterator[tuple[float, tuple[int, ...], Nodes]]:
    def below(symbol: int, start: int, width: int):
        here = {(start, start + width): symbol}
        if width == 1:
            yield 1.0, (symbol,), here
        for k in range(1, width):
            for b, c in np.argwhere(grammar.rules_NxNxN[symbol]).tolist():
                for p, left, left_nodes in below(b, start, k):
                    for q, right, right_nodes in below(c, start + k, width - k):
                        prob = grammar.rules_NxNxN[symbol, b, c] * p * q
                        yield prob, left + right, here | left_nodes | right_nodes

    for root in range(grammar.num_symbols):
        for prob, leaves, nodes in below(root, 0, length) if grammar.start_N[root] else ():
            yield grammar.start_N[root] * prob, leaves, nodes | {(): root}


def _rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def small_hmm(seed: int, num_states: int, num_words: int, length: int, min_length: int) -> Hmm:
    rng = np.random.default_rng(seed)
    K, V, tasks = num_states, num_words, tuple(range(1, length + 1))
    return Hmm(_rows(rng, K), _rows(rng, K, K), _rows(rng, K, V), length, min_length, tasks)


def small_tree(seed: int, num_states: int, num_words: int, depth: int) -> BalancedTree:
    rng = np.random.default_rng(seed)
    K, spans = num_states, []
    for width in (2**level for level in range(depth + 1)):
        spans += [(start, start + width) for start in range(0, 2**depth, width)]
    rules = _rows(rng, depth, K, K * K).reshape(depth, K, K, K)
    return BalancedTree(_rows(rng, K), rules, _rows(rng, K, num_words), tuple(spans))


def small_pcfg(
    seed: int, num_symbols: int, num_words: int, length: int, min_length: int = 1
) -> Pcfg:
    rng = np.random.default_rng(seed)
    N = num_symbols
    emission_N = rng.permutation(np.linspace(0.2, 0.8, N))
    rules = (1 - emission_N)[:, None, None] * _rows(rng, N, N * N).reshape(N, N, N)
    emissions = emission_N[:, None] * _rows(rng, N, num_words)
    names = [f"A{i}" for i in range(N)], [f"w{v}" for v in range(num_words)]
    grammar = Grammar(*map(tuple, names), _rows(rng, N), rules, emissions, (N,))
    return _in_float64(grammar, length, min_length)


def small_levelled(
    seed: int, level_sizes: tuple[int, ...], num_words: int, length: int, min_length: int = 2
) -> Pcfg:
    grammar = random_levelled_grammar(
        seed,
        level_sizes=level_sizes,
        num_words=num_words,
        emission_probability=0.4,
        rule_concentration=1.0,
        emission_concentration=1.0,
    )
    return _in_float64(grammar, length, min_length)


def _in_float64(grammar: Grammar, length: int, min_length: int) -> Pcfg:
    """With all places as tasks, the whole sentence first."""
    spans = [(s, e) for s in range(length) for e in range(s + 1, length + 1)]
    language = make_pcfg(grammar, length=length, min_length=min_length, tasks=[(), *spans])
    tables = {name: getattr(grammar, name) for name in ("start_N", "rules_NxNxN", "emissions_NxV")}
    return dataclasses.replace(language, **tables)


class MadeOnDemand(Mapping):
    """Languages that are made, in float32, when a test first uses them: collecting makes none."""

    def __init__(self, makers: dict[str, Callable[[], Any]]):
        self._makers, self._made = makers, {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            with jax.enable_x64(False):
                self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


SMALL = MadeOnDemand(
    {
        "hmm": lambda: small_hmm(0, num_states=3, num_words=3, length=5, min_length=1),
        "tree_of_4": lambda: small_tree(1, num_states=3, num_words=3, depth=2),
        "tree_of_8": lambda: small_tree(2, num_states=2, num_words=2, depth=3),
        "pcfg": lambda: small_pcfg(3, num_symbols=3, num_words=3, length=4),
        "longer_pcfg": lambda: small_pcfg(4, num_symbols=2, num_words=3, length=5, min_length=2),
        "levelled": lambda: small_levelled(5, (2, 2, 3), num_words=3, length=4),
        "cut_levels": lambda: small_levelled(6, (1, 2, 2, 2), num_words=3, length=5),
    }
)


class PrefixLaw(NamedTuple):
    """What follows each beginning of a sentence, by summing over all whole sentences.

    sentences: the probability of each. next_symbols: of each word, then of the end, by prefix.
    symbols: of each symbol above a place, jointly with the place's existence, by place and prefix.
    """

    sentences: dict[Words, float]
    next_symbols: dict[Words, np.ndarray]
    symbols: dict[tuple[int, ...], dict[Words, np.ndarray]]


def prefix_law(language: Hmm | Pcfg | BalancedTree | ZeroSum) -> PrefixLaw:
    """Enumerate the sentences of all lengths; tasks of the language are the places."""
    classes = {task.place: task.num_classes for task in language.tasks.values()}
    sentences, symbols = {}, {place: {} for place in classes}
    for length in _lengths(language):
        exact = derivations(language, length)
        held = {p: [nodes.get(p, C) for nodes in exact.nodes] for p, C in classes.items()}
        one_hot = {p: np.eye(C + 1)[held[p], :C] for p, C in classes.items()}  # 0 without the place
        for words in product(range(language.num_words), repeat=length):
            weights_D = exact.weights_D(words)
            sentences[words] = weights_D.sum()
            for place, one_hot_DxC in one_hot.items():
                symbols[place][words] = weights_D @ one_hot_DxC
    total = sum(sentences.values())
    prefixes = _sums_by_prefix(sentences)
    return PrefixLaw(
        sentences={words: p / total for words, p in sentences.items()},
        next_symbols=next_symbols(sentences, language.num_words),
        symbols={
            place: {w: p_C / prefixes[w] for w, p_C in _sums_by_prefix(of).items() if prefixes[w]}
            for place, of in symbols.items()
        },
    )


def next_symbols(sentences: dict[Words, float], num_words: int) -> dict[Words, np.ndarray]:
    """Return p_U of each word, then of the end, after each prefix of positive probability."""
    prefixes = _sums_by_prefix(sentences)
    return {
        prefix: np.array(
            [prefixes.get((*prefix, v), 0) for v in range(num_words)] + [sentences.get(prefix, 0)]
        )
        / p
        for prefix, p in prefixes.items()
        if p
    }


def _sums_by_prefix(of_sentences: dict[Words, Any]) -> dict[Words, Any]:
    sums: dict[Words, Any] = {}
    for words, value in of_sentences.items():
        for s in range(len(words) + 1):
            sums[words[:s]] = sums.get(words[:s], 0) + value
    return sums


def _lengths(language: Hmm | Pcfg | BalancedTree | ZeroSum) -> range:
    step = 2 if isinstance(language, ZeroSum) else 1
    return range(shortest(language), language.max_length + 1, step)


@cache
def small_derivations(name: str, length: int) -> Derivations:
    return derivations(SMALL[name], length)


def shortest(language: Hmm | Pcfg | BalancedTree | ZeroSum) -> int:
    return language.max_length if isinstance(language, BalancedTree) else language.min_length


def ragged_batch(
    language: Hmm | Pcfg | BalancedTree, seed: int, batch_size: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BxT, lengths_B): uniform words, the shortest and the longest length among them."""
    rng = np.random.default_rng(seed)
    B, T, V = batch_size, language.max_length, language.num_words
    lengths_B = rng.integers(shortest(language), T + 1, B).astype(np.int32)
    lengths_B[-2:] = shortest(language), T
    inside_BxT = np.arange(T) < lengths_B[:, None]
    return np.where(inside_BxT, rng.integers(0, V, (B, T)), V).astype(np.int32), lengths_B
