"""The language of a tiny teacher against all its sentences, by its plain uncached forward."""

import dataclasses
import math
import re
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.stats import chisquare

from jaxflat.languages.generated import language as generated
from jaxflat.languages.generated.language import Generated
from jaxflat.languages.prefixes import chain_rule
from jaxflat.models.causal import CausalTransformer, empty_cache
from tests.support.counts import in_full
from tests.support.enumeration import next_symbols
from tests.support.opt_corpus import opt_language
from tests.support.traced_arrays import traced_arrays

FIRST, STOP, NUM_TOKENS = 5, 2, 7
SHAPES = {  # kept tokens, min_length, max_length
    "from_one": ((4, 0, 6), 1, 4),
    "from_three": ((1, 3, 0), 3, 5),
    "one_length": ((6, 1, 3, 4), 4, 4),
}
SOME = ("from_three", "one_length", *in_full("from_one"))


@cache
def tiny(name: str) -> Generated:
    """Return float64 weights, large enough for very unequal probabilities."""
    kept, min_length, max_length = SHAPES[name]
    model = CausalTransformer(NUM_TOKENS, max_length, 8, 2, 2, 12, "gelu")
    with jax.enable_x64(True):
        initialize = jax.jit(partial(model.init, method="next_logits"))
        params = initialize(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        rng = np.random.default_rng(len(name))
        noise = jax.tree.map(lambda x: 0.7 * rng.standard_normal(x.shape), params)
        return Generated(
            params=jax.tree.map(lambda x, y: jnp.asarray(np.asarray(x) + y), params, noise),
            kept_V=jnp.asarray(kept, jnp.int32),
            tasks={},
            model=model,
            empty_cache=empty_cache,
            first_token=FIRST,
            stop_token=STOP,
            min_length=min_length,
            max_length=max_length,
            max_candidates=4**4,
        )


def single(language: Generated) -> Generated:
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), language.params)
    return dataclasses.replace(language, params=params, kept_V=np.asarray(language.kept_V))


@cache
def all_probs(name: str) -> dict[tuple[int, ...], float]:
    """Return P of every sentence, symbol by symbol, by full forwards in float64."""
    language = tiny(name)
    kept, least, most = SHAPES[name]
    with jax.enable_x64(True):
        variables, how = {"params": language.params}, {"method": "next_logits"}
        apply = jax.jit(lambda ids: language.model.apply(variables, ids, **how)[0])
        probs, prefixes = {}, {(): 1.0}
        for n in range(most):
            words = np.array(list(prefixes), np.int64).reshape(len(prefixes), n)
            ids = np.insert(np.array(kept)[words], 0, FIRST, axis=1).astype(np.int32)
            logits = np.asarray(apply(ids), np.float64)[:, -1]
            longer = {}
            for (prefix, p), row in zip(prefixes.items(), logits, strict=True):
                q = np.exp(row - row.max())
                stop = q[STOP] if n >= least else 0.0
                total = q[list(kept)].sum() + stop
                if n >= least:
                    probs[prefix] = p * stop / total
                for v, token in enumerate(kept):
                    longer[(*prefix, v)] = p * q[token] / total
            prefixes = longer
    return probs | prefixes


def conditional(name: str, words: tuple[int, ...], t: int, hidden: set[int]) -> np.ndarray:
    """Return p(x_t = v | the other words that are not hidden), summed over all completions."""
    V = len(SHAPES[name][0])
    choices = [range(V) if s == t or s in hidden else [w] for s, w in enumerate(words)]
    p_V = np.zeros(V)
    for completion in product(*choices):
        p_V[completion[t]] += all_probs(name)[completion]
    return p_V / p_V.sum()


def ragged(name: str, seed: int, batch_size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens_BxT, lengths_B) of uniform words, with the shortest and the longest length."""
    kept, least, most = SHAPES[name]
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(least, most + 1, batch_size).astype(np.int32)
    lengths_B[-2:] = least, most
    words_BxT = rng.integers(0, len(kept), (batch_size, most))
    inside_BxT = np.arange(most) < lengths_B[:, None]
    return np.where(inside_BxT, words_BxT, len(kept)).astype(np.int32), lengths_B


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_probabilities_of_all_sentences_are_those_of_the_plain_forward_and_sum_to_1(name):
    language, probs = tiny(name), all_probs(name)
    assert abs(sum(probs.values()) - 1) < 1e-10
    lengths = np.array([len(words) for words in probs], np.int32)
    tokens = [words + (language.num_words,) * (language.max_length - len(words)) for words in probs]
    log_probs = language.log_prob(np.array(tokens, np.int32), lengths)
    np.testing.assert_allclose(np.exp(log_probs), list(probs.values()), rtol=0, atol=1e-10)
    assert set(lengths) == set(range(language.min_length, language.max_length + 1))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_next_symbols_equal_enumeration_and_the_chain_rule(name):
    language, expected = tiny(name), next_symbols(all_probs(name), len(SHAPES[name][0]))
    tokens_BxT, lengths_B = ragged(name, seed=13)
    logp_BxSxR = np.asarray(language.next_log_probs(tokens_BxT, lengths_B))
    assert logp_BxSxR.dtype == np.float64
    V, T = language.num_words, language.max_length
    for b, length in enumerate(lengths_B.tolist()):
        words = tuple(tokens_BxT[b, :length].tolist())
        p_SxR = np.full((T + 1, V + 1), 1 / (V + 1))
        p_SxR[: length + 1] = [expected[words[:s]] for s in range(length + 1)]
        np.testing.assert_allclose(np.exp(logp_BxSxR[b]), p_SxR, rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        chain_rule(logp_BxSxR, tokens_BxT, lengths_B),
        language.log_prob(tokens_BxT, lengths_B),
        rtol=0,
        atol=1e-9,
    )
    shorter = np.minimum(lengths_B, T - 1)
    part = language.next_log_probs(tokens_BxT[:, :-1], shorter)
    np.testing.assert_allclose(
        part, language.next_log_probs(tokens_BxT, shorter)[:, :-1], atol=1e-10
    )
    assert np.isfinite(logp_BxSxR).all()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_conditionals_equal_enumeration(name):
    language = tiny(name)
    tokens_BxT, lengths_B = ragged(name, seed=1)
    logp_BxTxV = language.conditional_log_probs(tokens_BxT, lengths_B)
    assert logp_BxTxV.dtype == np.float64
    for b, length in enumerate(lengths_B.tolist()):
        for t in range(language.max_length):
            expected_V = np.full(language.num_words, 1 / language.num_words)
            if t < length:
                expected_V = conditional(name, tuple(tokens_BxT[b, :length]), t, set())
            np.testing.assert_allclose(np.exp(logp_BxTxV[b, t]), expected_V, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_masked_conditionals_equal_enumeration(name):
    """Masks hide any words, also none and all of a sentence, and mark pads, too."""
    language = tiny(name)
    tokens_BxT, lengths_B = ragged(name, seed=2, batch_size=6)
    masked_BxT = np.random.default_rng(3).random(tokens_BxT.shape) < 0.4
    masked_BxT[0], masked_BxT[1], masked_BxT[-2:, -1] = False, True, True
    inputs_BxT = np.where(masked_BxT, language.num_words + 1, tokens_BxT)
    allowing = dataclasses.replace(language, max_candidates=4**5)
    logp_BxTxV = allowing.conditional_log_probs(inputs_BxT, lengths_B, masked_BxT)
    for b, length in enumerate(lengths_B.tolist()):
        hidden = set(np.flatnonzero(masked_BxT[b, :length]).tolist())
        for t in range(language.max_length):
            expected_V = np.full(language.num_words, 1 / language.num_words)
            if t < length:
                expected_V = conditional(name, tuple(tokens_BxT[b, :length]), t, hidden)
            np.testing.assert_allclose(np.exp(logp_BxTxV[b, t]), expected_V, rtol=0, atol=1e-10)
    none_BxT = np.zeros_like(masked_BxT)
    np.testing.assert_allclose(
        allowing.conditional_log_probs(tokens_BxT, lengths_B, none_BxT),
        language.conditional_log_probs(tokens_BxT, lengths_B),
        atol=1e-10,
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_conditionals_of_part_of_a_batch_and_of_shorter_padding_are_the_same():
    """Seven sentences make one group only, and four columns are fewer than max_length."""
    language = tiny("from_three")
    tokens_BxT, lengths_B = ragged("from_three", seed=4)
    lengths_B = np.minimum(lengths_B, 4)
    whole = language.conditional_log_probs(tokens_BxT, lengths_B)
    part = language.conditional_log_probs(tokens_BxT[:7, :4], lengths_B[:7])
    np.testing.assert_allclose(part, whole[:7, :4], atol=1e-10)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_conditionals_at_positions_are_rows_of_all(name):
    language = tiny(name)
    tokens_BxT, lengths_B = ragged(name, seed=5)
    positions_Bx2 = np.random.default_rng(6).integers(0, language.max_length, (8, 2), np.int32)
    rows_Bx2xV = language.conditional_at(tokens_BxT, lengths_B, positions_Bx2)
    all_BxTxV = np.asarray(language.conditional_log_probs(tokens_BxT, lengths_B))
    expected = np.take_along_axis(all_BxTxV, positions_Bx2[..., None], axis=1)
    np.testing.assert_allclose(rows_Bx2xV, expected, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_chunks_of_candidates_and_sizes_in_common_change_nothing(monkeypatch):
    language = tiny("one_length")
    tokens_BxT, lengths_B = ragged("one_length", seed=7)
    expected = language.conditional_log_probs(tokens_BxT, lengths_B)
    module = "jaxflat.languages.generated.language"
    monkeypatch.setattr(f"{module}.CHUNK", 150)  # 2 or 3 of 4 words
    monkeypatch.setattr(f"{module}._SIZES", 2)  # 0, 2 or 4 words to read
    other = dataclasses.replace(language, max_candidates=1)  # compiles again
    chunked = other.conditional_log_probs(tokens_BxT, lengths_B)
    np.testing.assert_allclose(chunked, expected, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_a_language_is_an_argument_of_a_compiled_function():
    traces = []

    @jax.jit
    def first_log_probs(language, tokens_BxT, lengths_B):
        traces.append(1)
        return language.conditional_log_probs(tokens_BxT, lengths_B)[0, 0]

    one = tiny("from_one")
    other = dataclasses.replace(one, params=jax.tree.map(lambda x: 2 * x, one.params))
    args = ragged("from_one", seed=8)
    outputs = [np.asarray(first_log_probs(language, *args)) for language in (one, other)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    assert len(traces) == 1


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_does_not_look_at_the_word_it_predicts():
    language, T = tiny("one_length"), 4
    tokens_BxT, lengths_B = ragged("one_length", seed=9)
    before = np.asarray(language.conditional_log_probs(tokens_BxT, lengths_B))
    np.testing.assert_allclose(np.exp(before).sum(axis=2), 1, rtol=1e-12)
    for t in range(T):
        for word in ((tokens_BxT[:, t] + 1) % 4, np.full(8, 5, np.int32)):  # another word; the mask
            changed_BxT = tokens_BxT.copy()
            changed_BxT[:, t] = word
            after = np.asarray(language.conditional_log_probs(changed_BxT, lengths_B))
            np.testing.assert_allclose(after[:, t], before[:, t], rtol=1e-10)
            assert np.abs(after - before)[:, np.arange(T) != t].max() > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_a_sentence_of_the_longest_length_says_nothing_of_the_stop_symbol():
    """Otherwise the symbols that can follow the last word would predict it."""
    language = tiny("from_three")
    tokens_1xT = np.array([[0, 2, 1, 1, 0]], np.int32)
    last = language.conditional_log_probs(tokens_1xT, np.array([5], np.int32))[0, 4]
    ids = np.array([[FIRST, *np.array(SHAPES["from_three"][0])[tokens_1xT[0, :4]]]], np.int32)
    logits, _ = language.model.apply({"params": language.params}, ids, method="next_logits")
    kept = jax.nn.log_softmax(logits[0, -1, jnp.array(SHAPES["from_three"][0])])
    np.testing.assert_allclose(last, kept, atol=1e-10)


@pytest.mark.slow
def test_float32_is_near_and_impossible_lengths_and_unlikely_words_stay_finite():
    language = single(tiny("from_three"))
    tokens_BxT, lengths_B = ragged("from_three", seed=11)
    with jax.enable_x64(True):
        exact = tiny("from_three").conditional_log_probs(tokens_BxT, lengths_B)
    logp_BxTxV = language.conditional_log_probs(tokens_BxT, lengths_B)
    assert logp_BxTxV.dtype == np.float32
    np.testing.assert_allclose(np.exp(logp_BxTxV), np.exp(exact), atol=1e-5)
    too_short = np.ones_like(lengths_B)
    steep = dataclasses.replace(language, params=jax.tree.map(lambda x: 100 * x, language.params))
    for other, lengths in ((language, too_short), (steep, lengths_B)):
        logp_BxTxV = other.conditional_log_probs(tokens_BxT, lengths)
        assert np.isfinite(logp_BxTxV).all()
        np.testing.assert_allclose(np.exp(logp_BxTxV).sum(axis=2), 1, rtol=1e-5)
    assert np.exp(logp_BxTxV).min() < 1e-30


def test_too_many_completions_and_traced_masks_are_refused_in_one_line():
    language = single(tiny("from_one"))
    tokens_BxT, lengths_B = ragged("from_one", seed=12)
    masked_BxT = np.arange(4)[None] < np.full((8, 1), 3)
    small = dataclasses.replace(language, max_candidates=80)
    message = r"^V=3 words at m=4 positions, .*: more than max_candidates=80$"
    with pytest.raises(ValueError, match=message):
        small.conditional_log_probs(tokens_BxT, lengths_B, masked_BxT)
    with pytest.raises(ValueError, match=r"^masked_BxT and lengths_B must be concrete"):
        jax.jit(language.conditional_log_probs)(tokens_BxT, lengths_B, masked_BxT)
    with pytest.raises(ValueError, match=r"min_length must be in 1\.\.max_length=4; got 5"):
        dataclasses.replace(language, min_length=5)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.slow
def test_every_sentence_has_its_probability(name):
    """One chi-square test over all possible sentences, which have different lengths."""
    language, probs = single(tiny(name)), all_probs(name)
    sentences = language.sample(jax.random.key(0), 50_000)
    assert sentences.latents is None
    tokens_BxT, lengths_B = np.asarray(sentences.tokens_BxT), np.asarray(sentences.lengths_B)
    assert (tokens_BxT.dtype, lengths_B.dtype) == (np.int32, np.int32)
    assert lengths_B.min() >= language.min_length
    past_end = np.arange(language.max_length) >= lengths_B[:, None]
    assert (tokens_BxT[past_end] == language.num_words).all()
    index = {words: i for i, words in enumerate(probs)}
    seen = [index[tuple(row[:n])] for row, n in zip(tokens_BxT.tolist(), lengths_B, strict=True)]
    counts, expected = np.bincount(seen, minlength=len(probs)), 50_000 * np.array([*probs.values()])
    rare = expected < 5
    cells = [(np.append(x[~rare], x[rare].sum())) for x in (counts, expected)]
    used = cells[1] > 0
    assert chisquare(cells[0][used], cells[1][used]).pvalue > 1e-3


@pytest.mark.slow
def test_a_sentence_is_a_function_of_key_and_index():
    language, key = single(tiny("from_three")), jax.random.key(1)
    few, many = language.sample(key, 8), language.sample(key, 32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:8]), few, many)
    other = language.sample(jax.random.key(2), 32)
    assert (np.asarray(other.tokens_BxT) != np.asarray(many.tokens_BxT)).any()


@pytest.mark.slow
@pytest.mark.parametrize("most_together", [1, 5, 8])
def test_slices_give_the_sentences_of_one_batch(monkeypatch, most_together):
    language, key = single(tiny("from_three")), jax.random.key(4)
    together = language.sample(key, 13)
    per_sentence = 2 * 2 * 8 * 5 * 4  # keys and values, layers, width, positions, bytes
    monkeypatch.setattr(generated, "CACHE_BYTES", per_sentence * most_together)
    Generated.sample.clear_cache()
    assert language.sentences_together() == most_together
    sliced = language.sample(key, 13)
    Generated.sample.clear_cache()
    jax.tree.map(np.testing.assert_array_equal, sliced, together)


def test_sampling_a_shard_makes_no_array_larger_than_the_bound():
    """Of a teacher like OPT-125M: the caches of all 65,536 sentences would take 108 GiB."""
    language = opt_language(num_layers=12)
    made = traced_arrays(lambda x, key: x.sample(key, 65_536), language, jax.random.key(0))
    sizes = [math.prod(array.shape) * array.dtype.itemsize for array in made]
    assert generated.CACHE_BYTES / 4 < max(sizes) <= generated.CACHE_BYTES


@pytest.mark.slow
def test_each_of_8_devices_samples_its_part_of_each_slice(monkeypatch):
    language = single(tiny("from_three"))
    monkeypatch.setattr(generated, "CACHE_BYTES", 2 * 2 * 8 * 5 * 4 * 27)  # of 27 sentences
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    sample = jax.jit(lambda language, key: language.sample(key, 64).tokens_BxT)
    sharded = jax.jit(sample, out_shardings=over_data)
    program = sharded.lower(language, jax.random.key(5)).compile().as_text()
    Generated.sample.clear_cache()
    assert "f32[2,3,2,5,4]" in program  # keys or values: 64 sentences are 3 slices of 8 x 3
    assert not re.search(r"f32\[2,\d\d,2,5,4\]", program)


@pytest.mark.slow
def test_sharded_over_8_devices_equals_one_device():
    language, key = single(tiny("from_three")), jax.random.key(3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over_data = NamedSharding(mesh, PartitionSpec("data"))

    @partial(jax.jit, out_shardings=over_data)
    def sharded(language, key):
        sentences = language.sample(key, 32)
        return sentences.tokens_BxT, sentences.lengths_B

    tokens_BxT, lengths_B = sharded(language, key)
    one = language.sample(key, 32)
    np.testing.assert_array_equal(tokens_BxT, one.tokens_BxT)
    np.testing.assert_array_equal(lengths_B, one.lengths_B)
    logp_BxTxV = language.conditional_log_probs(tokens_BxT, lengths_B)
    for made in (tokens_BxT, logp_BxTxV):
        assert len(made.sharding.device_set) == 8
        assert made.addressable_shards[0].data.shape[0] == 4  # split, not repeated
    expected = language.conditional_log_probs(one.tokens_BxT, one.lengths_B)
    np.testing.assert_allclose(logp_BxTxV, expected, atol=1e-5)
