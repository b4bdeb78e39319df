"""The speed of languages: sampling, exact conditionals, next symbols, the paper code's labels.

Every device has its own part of a batch. If NLTK is installed, its chart parser labels sentences of
the same batch by whole-sentence inside probabilities.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxflat.benchmark.timing import Figure, Stopwatch, repeated, summarize
from jaxflat.distributed import sharding
from jaxflat.languages import LANGUAGES
from jaxflat.languages.sentences import Sentences

BATCH, SAMPLED = 512, 2048
RANDOM = {
    "num_words": 200,
    "emission_probability": 0.2,
    "rule_concentration": 0.01,
    "emission_concentration": 0.05,
}
FULL = {"level_sizes": (9, 8, 8, 8, 8, 8), "length": 32, "min_length": 5, "tasks": ()} | RANDOM
HALF = {"level_sizes": (9, 10, 10, 10, 10), "length": 16, "min_length": 5, "tasks": ()} | RANDOM
# Our time does not depend on the probabilities; NLTK's depends on how many are not 0. On this
# sparse grammar NLTK is about as fast as on the grammar of Liu et al. (2023).
SPARSE = HALF | {
    "rule_concentration": 0.003,
    "emission_concentration": 0.002,
    "tasks": ((), (0, 4), (0, 2)),
}
HMM = {
    "num_states": 100,
    "num_words": 200,
    "length": 16,
    "min_length": 16,
    "transition_concentration": 0.7,
    "emission_concentration": 0.05,
    "tasks": (),
}


def measure_languages(repeats: int, seconds: float) -> Iterator[tuple[str, Figure]]:
    """Yield sentences a second: sampling, the oracles, official labels, labels by NLTK."""
    full, half = (LANGUAGES["pcfg"](0, **settings) for settings in (FULL, HALF))
    hmm = LANGUAGES["hmm"](0, **HMM)

    def rate(run: Callable[[], Any], size: int) -> Figure:
        watch = Stopwatch(partial(repeated, run), seconds)
        return summarize([size / watch.seconds() for _ in range(repeats)], "sentences/s")

    yield "languages/pcfg_sampled_per_s", rate(_sampler(full), SAMPLED)
    for name, function, language in (
        ("pcfg_conditionals_16", _conditionals, half),
        ("pcfg_conditionals_32", _conditionals, full),
        ("hmm_conditionals", _conditionals, hmm),
        ("pcfg_next_symbols_16", _next_symbols, half),
        ("hmm_next_symbols", _next_symbols, hmm),
    ):
        yield f"languages/{name}_per_s", rate(_on_batch(function, language), BATCH)
    sparse = LANGUAGES["pcfg"](0, **SPARSE)
    labels = _in_64_bits(_on_batch(_official_labels, sparse))
    yield "languages/official_labels_per_s", rate(labels, BATCH)
    if has_nltk():
        watch = Stopwatch(partial(repeated, labels), seconds)
        yield from _compare_with_nltk(sparse, watch, repeats, seconds).items()


def has_nltk() -> bool:
    """Say whether NLTK can be imported."""
    try:
        import nltk
    except ImportError:
        return False
    return bool(nltk)


def _compare_with_nltk(
    language: Any, ours: Stopwatch, repeats: int, seconds: float
) -> dict[str, Figure]:
    """Return NLTK's rate at one label a sentence, and our rate at three over it, timed in turn."""
    from jaxflat.benchmark.nltk_peer import NltkLabeler

    labeler = NltkLabeler(language)
    sentences = _batch_of(language)
    tokens_BxT, lengths_B = sentences.tokens_BxT.tolist(), sentences.lengths_B.tolist()
    words_B = [tokens_T[:n] for tokens_T, n in zip(tokens_BxT, lengths_B, strict=True)]
    nltks = Stopwatch(lambda n: [labeler.label(words_B[b % BATCH]) for b in range(n)], seconds)
    rates, ratios = [], []
    for _ in range(repeats):
        our_rate = BATCH / ours.seconds()
        rates.append(1 / nltks.seconds())
        ratios.append(our_rate / rates[-1])
    return {
        "languages/nltk_chart_per_s": summarize(rates, "sentences/s"),
        "languages/official_labels_in_nltk": summarize(ratios, "times"),
    }


def _batch_of(language: Any) -> Sentences:
    return language.sample(jax.random.key(0), BATCH)


def _conditionals(language: Any, sentences: Sentences) -> jax.Array:
    return language.conditional_log_probs(sentences.tokens_BxT, sentences.lengths_B)


def _next_symbols(language: Any, sentences: Sentences) -> jax.Array:
    return language.next_log_probs(sentences.tokens_BxT, sentences.lengths_B)


def _official_labels(language: Any, sentences: Sentences) -> list[tuple[jax.Array, jax.Array]]:
    return [task.labels(sentences, "official") for task in language.tasks.values()]


def _sampler(language: Any) -> Callable[[], Any]:
    """Return a call that samples SAMPLED sentences, each device its share from its own key."""
    num_devices = _mesh().shape["data"]

    def sample(language: Any, keys: jax.Array) -> Sentences:
        return language.sample(keys[0], SAMPLED // num_devices)

    return _over_devices(sample, language, jax.random.split(jax.random.key(0), num_devices))


def _on_batch(function: Callable[[Any, Sentences], Any], language: Any) -> Callable[[], Any]:
    return _over_devices(function, language, _batch_of(language))


def _over_devices(function: Callable[..., Any], language: Any, examples: Any) -> Callable[[], Any]:
    """Return a call of function(language, a device's part of the examples) on every device.

    Each device compiles for its part only: `jit` would gather examples whose axis is merged.
    """
    mesh = _mesh()
    specs = (P(), P("data"))
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("data")))
    language = sharding.replicate(mesh, language)
    examples = jax.device_put(examples, NamedSharding(mesh, P("data")))
    return lambda: mapped(language, examples)


def _in_64_bits(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call with float64 enabled: official labels cannot enable it inside a `jit`."""

    def precise() -> Any:
        with jax.enable_x64(True):
            return call()

    return precise


def _mesh() -> jax.sharding.Mesh:
    """Return a mesh of the most devices that divide the batches evenly."""
    common = math.gcd(BATCH, SAMPLED)
    return sharding.make_mesh(max(n for n in range(1, jax.device_count() + 1) if common % n == 0))
