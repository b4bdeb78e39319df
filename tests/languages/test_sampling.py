"""The samplers against enumeration, and against the oracle."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.stats import chisquare

from jaxflat.languages import (
    pcfg_from_file,
    random_balanced_tree,
    random_hmm,
    random_pcfg,
    random_recursive_pcfg,
)
from jaxflat.languages.batches import mask_one
from tests.support.enumeration import (
    MadeOnDemand,
    derivations,
    shortest,
    small_hmm,
    small_levelled,
    small_pcfg,
    small_tree,
)

TINY = MadeOnDemand(
    {
        "hmm": lambda: small_hmm(0, num_states=3, num_words=3, length=4, min_length=2),
        "balanced_tree": lambda: small_tree(1, num_states=2, num_words=3, depth=2),
        "pcfg": lambda: small_pcfg(2, num_symbols=2, num_words=3, length=5, min_length=2),
        "levelled": lambda: small_levelled(3, (2, 2, 2), num_words=3, length=4),
        "cut_levels": lambda: small_levelled(4, (1, 2, 2, 2), num_words=2, length=6, min_length=3),
    }
)
RANDOM = MadeOnDemand(
    {
        "hmm": lambda: random_hmm(
            0,
            num_states=10,
            num_words=24,
            length=8,
            min_length=4,
            transition_concentration=0.5,
            emission_concentration=0.1,
            tasks=(3, 6),
        ),
        "balanced_tree": lambda: random_balanced_tree(
            0,
            depth=3,
            num_states=4,
            num_words=16,
            rule_concentration=0.1,
            emission_concentration=0.1,
            tasks=((0, 8), (0, 4)),
        ),
        "pcfg": lambda: random_pcfg(
            0,
            level_sizes=(3, 3, 4, 4),
            num_words=12,
            length=8,
            min_length=2,
            emission_probability=0.3,
            rule_concentration=0.1,
            emission_concentration=0.1,
            tasks=((), (0, 3), (2, 4)),
        ),
        "recursive_pcfg": lambda: random_recursive_pcfg(
            0,
            num_nonterminals=4,
            num_words=12,
            length=7,
            min_length=2,
            emission_probability=0.5,
            rule_concentration=0.1,
            emission_concentration=0.1,
            tasks=((0, 3), (2, 4)),
        ),
    }
)


def _chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """Return the p-value of a test that pools cells expected fewer than 5 times."""
    expected = probs * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return chisquare(counts, expected).pvalue


@pytest.mark.parametrize("name", TINY)
@pytest.mark.slow
def test_every_sentence_has_its_probability(name):
    """One chi-square test over all possible sentences, which have different lengths."""
    language, probs = TINY[name], {}
    for length in range(shortest(language), language.max_length + 1):
        exact = derivations(language, length)
        for words in product(range(language.num_words), repeat=length):
            probs[words] = exact.prob(words)
    if name == "hmm":  # each length has another distribution
        probs = {words: p / (4 - 2 + 1) for words, p in probs.items()}
    p = np.array(list(probs.values()))
    sentences = language.sample(jax.random.key(0), 100_000)
    index = {words: i for i, words in enumerate(probs)}
    tokens_BxT, lengths_B = np.asarray(sentences.tokens_BxT), np.asarray(sentences.lengths_B)
    seen = [index[tuple(row[:n])] for row, n in zip(tokens_BxT.tolist(), lengths_B, strict=True)]
    assert _chi_square(np.bincount(seen, minlength=len(p)), p / p.sum()) > 1e-3
    past_end = np.arange(language.max_length) >= lengths_B[:, None]
    assert (tokens_BxT[past_end] == language.num_words).all()


def test_pcfg_lengths_are_conditional_on_the_longest():
    """P(n words) by enumeration of all derivations, given 2 <= n <= 5."""
    language = TINY["pcfg"]
    mass_N = language.emissions_NxV.sum(axis=1)
    probs = np.zeros(6)
    for n in range(2, 6):
        exact = derivations(language, n)
        probs[n] = (exact.probs_D * mass_N[exact.leaves_DxT].prod(axis=1)).sum()
    lengths_B = language.sample(jax.random.key(1), 100_000).lengths_B
    counts = np.bincount(np.asarray(lengths_B), minlength=6)
    assert counts[:2].sum() == 0
    assert _chi_square(counts[2:], probs[2:] / probs.sum()) > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_latents_make_the_words(name):
    """(hidden symbol, word) pairs at the leaves have the emission probabilities."""
    language = TINY[name]
    sentences = language.sample(jax.random.key(2), 100_000)
    tokens_BxT, latents = np.asarray(sentences.tokens_BxT), sentences.latents
    if name == "hmm":
        inside = np.asarray(latents) >= 0
        symbols, words = np.asarray(latents)[inside], tokens_BxT[inside]
        emissions_KxV = language.emissions_KxV
    elif name == "balanced_tree":
        symbols, words = np.asarray(latents)[:, 3:].ravel(), tokens_BxT.ravel()
        emissions_KxV = language.emissions_KxV
    else:
        leaf_BxM = np.asarray(latents.width_BxM) == 1
        rows, _ = np.nonzero(leaf_BxM)
        symbols = np.asarray(latents.symbol_BxM)[leaf_BxM]
        words = tokens_BxT[rows, np.asarray(latents.start_BxM)[leaf_BxM]]
        emissions_KxV = language.emissions_NxV
    for symbol in np.unique(symbols):
        probs_V = emissions_KxV[symbol] / emissions_KxV[symbol].sum()
        counts_V = np.bincount(words[symbols == symbol], minlength=len(probs_V))
        assert _chi_square(counts_V, probs_V) > 1e-3


def test_pcfg_latents_are_trees():
    """Inner nodes are followed by their left child and, after its subtree, their right child."""
    language = RANDOM["recursive_pcfg"]
    sentences = language.sample(jax.random.key(3), 32)
    trees = jax.tree.map(np.asarray, sentences.latents)
    for b, length in enumerate(np.asarray(sentences.lengths_B)):
        starts, widths = trees.start_BxM[b], trees.width_BxM[b]
        assert (starts[0], widths[0]) == (0, length)
        assert (widths > 0).sum() == 2 * length - 1
        assert (trees.symbol_BxM[b][2 * length - 1 :] == -1).all()
        for m in np.flatnonzero(widths > 1):
            left, right = m + 1, m + 2 * widths[m + 1]
            assert (starts[left], starts[right]) == (starts[m], starts[m] + widths[left])
            assert widths[left] + widths[right] == widths[m]


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.slow
def test_cross_entropy_is_the_stated_optimum(name):
    """Sampled cross-entropy of the oracle = its mean conditional entropy on other sentences."""
    language = RANDOM[name]

    def predictions(seed: int):
        sample_key, mask_key = jax.random.split(jax.random.key(seed))
        sentences = language.sample(sample_key, 50_000)
        inputs_BxT, positions_Bx1 = mask_one(
            mask_key, sentences.tokens_BxT, sentences.lengths_B, language.num_words + 1
        )
        # The mask is out of range, but at its own position it must not matter.
        masked_BxT = inputs_BxT == language.num_words + 1
        logp_BxTxV = language.conditional_log_probs(inputs_BxT, sentences.lengths_B, masked_BxT)
        logp_BxV = jnp.take_along_axis(logp_BxTxV, positions_Bx1[..., None], axis=1)[:, 0]
        words_Bx1 = jnp.take_along_axis(sentences.tokens_BxT, positions_Bx1, axis=1)
        return np.asarray(logp_BxV, np.float64), np.asarray(words_Bx1)

    logp_BxV, words_Bx1 = predictions(seed=4)
    losses_B = -np.take_along_axis(logp_BxV, words_Bx1, axis=1)[:, 0]
    logp_BxV, _ = predictions(seed=5)
    entropies_B = -(np.exp(logp_BxV) * logp_BxV).sum(axis=1)
    sem = np.hypot(losses_B.std(ddof=1), entropies_B.std(ddof=1)) / np.sqrt(len(losses_B))
    assert sem < 0.01
    assert abs(losses_B.mean() - entropies_B.mean()) < 3 * sem


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.slow
def test_a_sentence_is_a_function_of_key_and_index(name):
    language, key = RANDOM[name], jax.random.key(6)
    few, many = language.sample(key, 8), language.sample(key, 32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:8]), few, many)
    other = language.sample(jax.random.key(7), 32)
    assert (np.asarray(other.tokens_BxT) != np.asarray(many.tokens_BxT)).any()


@pytest.mark.parametrize("name", RANDOM)
def test_sharded_sampling_equals_one_device(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    sample = jax.jit(
        lambda language, key: language.sample(key, 32).tokens_BxT, out_shardings=over_data
    )
    key = jax.random.key(8)
    sharded_BxT = sample(RANDOM[name], key)
    assert len(sharded_BxT.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded_BxT, RANDOM[name].sample(key, 32).tokens_BxT)


def test_no_sentence_of_the_lengths_asked_for_is_an_error():
    with pytest.raises(ValueError, match=r"the grammar has no sentence of 3\.\.4 words"):
        small_levelled(0, (2, 2), num_words=4, length=4, min_length=3)


def test_a_grammar_of_odd_lengths_has_no_sentence_of_two_words(tmp_path):
    path = tmp_path / "odd.txt"
    path.write_text("A x 0.5\nA B A 0.5\nB A A 1\n")
    options = {"path": str(path), "tasks": ((),)}
    with pytest.raises(ValueError, match=r"the grammar has no sentence of 2\.\.2 words"):
        pcfg_from_file(0, length=2, min_length=2, **options)
    sentences = pcfg_from_file(0, length=5, min_length=2, **options).sample(jax.random.key(0), 100)
    assert set(sentences.lengths_B.tolist()) == {3, 5}


@pytest.mark.slow
def test_sentences_far_rarer_than_float32_can_tell_are_whole_trees():
    """Sentences of 32 words have probability 1e-39 here, yet every draw is a whole tree."""
    language = random_recursive_pcfg(
        0,
        num_nonterminals=5,
        num_words=4,
        length=32,
        min_length=32,
        emission_probability=0.02,
        rule_concentration=1.0,
        emission_concentration=1.0,
        tasks=((),),
    )
    tree = language.sample(jax.random.key(0), 50).latents
    np.testing.assert_array_equal((tree.width_BxM == 1).sum(axis=1), 32)
    np.testing.assert_array_equal((tree.width_BxM > 1).sum(axis=1), 31)
    assert len(set(tree.width_BxM[:, 1].tolist())) > 3
