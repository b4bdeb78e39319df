"""Call each user's function of a config once, on small inputs, before any training.

So a mistake in a function ends the command with one line, not a run after hours.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

from jaxflat.config import Config, functions
from jaxflat.config.loading import place_in
from jaxflat.config.sweeps import SEEDS
from jaxflat.flatness import Estimate
from jaxflat.languages.batches import Batch, CausalBatch
from jaxflat.languages.tasks import LABELINGS
from jaxflat.runs import builders
from jaxflat.runs.languages import language_kind, make_language
from jaxflat.runs.measure_flatness import make_problem
from jaxflat.runs.trajectory import Checkpoint

NUM_SENTENCES = 4  # of the small inputs
LARGEST = 10**7  # parameters; larger models are not run, only their shapes are checked


def check_functions(config: Config) -> None:
    """Raise ValueError that names the first user's function that is unusable, and the reason."""
    _check(config.language.name, "language", config.language, _check_language)
    if config.model.name != "lookup_table":
        _check(config.model.name, "model", config.model, _check_model, config.language)
    for name in config.phase_order:
        phase, key = config.phases[name], f"phases.{name}"
        sections = config.language, config.model
        _check(phase.objective, key, phase, _check_objective, *sections)
        optimizer = phase.optimizer
        _check(optimizer.name, f"{key}.optimizer", optimizer, _check_optimizer, *sections)
    for name in config.flatness.measures if config.phase_order else ():
        _check(name, "flatness", config.flatness, _check_measure, config)
    for name in functions.sections_in(config.probes):
        _check(name, "probes", config.probes, _check_probe)


def _check(name: str, prefix: str, section: Config, check: Callable[..., None], *context) -> None:
    """Run a check of section[name], if that is a user's function; name it in the error."""
    if not functions.is_function(section.get(name)):
        return
    try:
        check(section, name, *context)
    except Exception as error:  # the user's function may raise anything
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        file = inspect.getsourcefile(inspect.unwrap(section[name].function.function))
        text = " ".join(str(error).split())
        raise ValueError(f"{prefix}.{name}: {kind}{text}{place_in(file, error)}") from error


@functools.cache
def _check_language(section: Config, name: str) -> None:
    language = make_language(section)
    sentences = language.sample(jax.random.key(0), NUM_SENTENCES)
    tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
    _expect("sample: tokens_BxT", tokens_BxT.shape, (NUM_SENTENCES, language.max_length))
    _expect("sample: lengths_B", lengths_B.shape, (NUM_SENTENCES,))
    log_probs_BxTxV = language.conditional_log_probs(tokens_BxT, lengths_B)
    shape = (*tokens_BxT.shape, language.num_words)
    _expect("conditional_log_probs", log_probs_BxTxV.shape, shape)
    sums_BxT = np.exp(np.asarray(log_probs_BxTxV, np.float64)).sum(-1)
    if not np.allclose(sums_BxT, 1, atol=1e-3):
        raise ValueError(f"conditional_log_probs: probabilities sum to {sums_BxT.min():.4f}, not 1")
    if section.masking == "causal":
        for method in ("next_log_probs", *(["prefix_posteriors"] if language.tasks else [])):
            if not hasattr(language, method):
                raise ValueError(f"language.masking='causal' needs a method {method}")
        shape = (NUM_SENTENCES, language.max_length + 1, language.num_words + 1)
        _expect("next_log_probs", language.next_log_probs(tokens_BxT, lengths_B).shape, shape)
    for task_name, task in language.tasks.items():
        labels_B, valid_B = task.labels(sentences, LABELINGS[0])
        _expect(f"tasks[{task_name!r}].labels", (labels_B.shape, valid_B.shape), ((4,), (4,)))
        probs_BxC = task.posterior(sentences)
        _expect(f"tasks[{task_name!r}].posterior", probs_BxC.shape, (4, task.num_classes))


@functools.cache
def _check_model(section: Config, name: str, language_section: Config) -> None:
    model, batch = _model_and_batch(language_section, section)
    params, causal = _params(model), language_section.masking == "causal"
    num_symbols = batch.targets_BxMxV.shape[-1]

    def outputs(positions_BxM: Any) -> Any:
        words = (batch.inputs_BxT, batch.lengths_B, positions_BxM)
        return jax.eval_shape(lambda: model.apply({"params": _zeros(params)}, *words))

    for positions_BxM, shape in (
        (batch.positions_BxM, batch.positions_BxM.shape),
        (None, batch.inputs_BxT.shape),
    ):
        logits, intermediates = outputs(positions_BxM)
        where = f"with positions_BxM {'given' if positions_BxM is not None else 'None'}"
        if positions_BxM is not None or not causal:
            _expect(f"logits_BxMxV {where}", logits.shape, (*shape, num_symbols))
        features = intermediates["features_BxMxD"]
        _expect(f"features_BxMxD {where}, its first axes", features.shape[:2], shape)
    if sum(leaf.size for leaf in jax.tree.leaves(params)) <= LARGEST:
        _check_hidden(model, batch, causal)


def _check_hidden(model: Any, batch: Batch, causal: bool) -> None:
    """Raise ValueError if logits depend on padding or, of a causal model, on later words."""
    length, num_words = batch.inputs_BxT.shape[1], batch.targets_BxMxV.shape[-1] - causal
    end, words_T = max(length // 2, 1), np.arange(length, dtype=np.int32) % num_words
    num_asked = end
    if causal:  # prediction s follows s words
        others_T, num_real, num_asked = (words_T + 1) % num_words, length, min(end + 1, length)
        mistake = "a word changes the logits of its own or an earlier prediction"
    else:
        others_T, num_real = np.full_like(words_T, num_words), end
        mistake = "padding changes the logits of a sentence's words"
    inputs_2xT = np.stack([words_T, np.where(np.arange(length) < end, words_T, others_T)])
    positions_2xM = np.tile(np.arange(num_asked, dtype=np.int32), (2, 1))
    words = inputs_2xT, np.full(2, num_real, np.int32), positions_2xM
    params = builders.initializer(model, None)(jax.random.key(0))
    logits_2xMxV, _ = jax.jit(model.apply)({"params": params}, *words)
    change = float(jnp.abs(logits_2xMxV[0] - logits_2xMxV[1]).max())
    if change > 1e-4 * float(jnp.abs(logits_2xMxV).max()):
        raise ValueError(f"{mistake} by {change:.2g}")


@functools.cache
def _check_objective(
    phase: Config, name: str, language_section: Config, model_section: Config
) -> None:
    model, batch = _model_and_batch(language_section, model_section)
    loss_fn = functions.call(phase[name], apply_fn=model.apply)
    loss_sum, weight = jax.eval_shape(loss_fn, _params(model), batch)
    _expect("loss_fn(params, batch): loss_sum, weight", (loss_sum.shape, weight.shape), ((), ()))


@functools.cache
def _check_optimizer(
    section: Config, name: str, language_section: Config, model_section: Config
) -> None:
    params = _params(_model_and_batch(language_section, model_section)[0])
    optimizer = optax.with_extra_args_support(functions.call(section[name], learning_rate=1.0))

    def update(params: Any) -> Any:
        state = optimizer.init(params)
        with jax.numpy_dtype_promotion("standard"):
            return state, *optimizer.update(params, state, params, grad_fn=lambda p, _: p)

    state, updates, new_state = jax.eval_shape(update, params)
    _expect("update: the updates", _shapes(updates), _shapes(params))
    _expect("update: the new state", _shapes(new_state), _shapes(state))


def _check_measure(section: Config, name: str, config: Config) -> None:
    if language_kind(config.language).is_prepared(config.language):
        _measure_untrained(_smallest(config), name)


def _smallest(config: Config) -> Config:
    """Return the config with few sentences, a small model, and without what differs by point."""
    small = config.to_dict()
    small |= {"phase_order": (), "phases": {}, "probes": {}, "evaluation": {"batch_size": 1024}}
    small |= dict.fromkeys(SEEDS, 0)
    if config.model.name not in functions.sections_in(config.model):
        small["model"] |= {"num_layers": 1, "width": config.model.head_size}
    small["flatness"] |= {"microbatch_size": 2 * builders.make_mesh(config).size}
    return FrozenConfigDict(small)


@functools.cache
def _measure_untrained(config: Config, name: str) -> None:
    params = builders.init_params(config, builders.make_mesh(config))
    problem = make_problem(config, builders.make_model(config), params, Checkpoint(0))
    estimate = functions.call(config.flatness[name], problem=problem)
    if not isinstance(estimate, Estimate):
        raise ValueError(f"returns {type(estimate).__name__}; it must return an Estimate")
    _expect("the mean and sem", (jnp.shape(estimate.mean), jnp.shape(estimate.sem)), ((), ()))


@functools.cache
def _check_probe(section: Config, name: str) -> None:
    shots = min(section.shots)
    features_NxF = np.asarray(jax.random.normal(jax.random.key(0), (shots + 4, 8)))
    predicted_M = functions.call(
        section[name],
        key=jax.random.key(0),
        features_NxF=features_NxF[:shots],
        labels_N=np.arange(shots) % 3,
        test_features_MxF=features_NxF[shots:],
        num_classes=3,
    )
    _expect("the labels", np.shape(predicted_M), (4,))


def _model_and_batch(language_section: Config, model_section: Config) -> tuple[Any, Batch]:
    """Return a model, and a batch of zeros; a masked one has two masked words a sentence."""
    num_words, max_length = language_kind(language_section).sizes(language_section)
    integers = functools.partial(jnp.zeros, dtype=jnp.int32)
    make, num_predictions, num_symbols = Batch, 2, num_words
    if language_section.masking == "causal":
        make, num_predictions, num_symbols = CausalBatch, max_length, num_words + 1
    batch = make(
        inputs_BxT=integers((NUM_SENTENCES, max_length)),
        lengths_B=integers(NUM_SENTENCES) + max_length,
        positions_BxM=integers((NUM_SENTENCES, num_predictions)),
        targets=jnp.zeros((NUM_SENTENCES, num_predictions, num_symbols)),
        weights_BxM=jnp.zeros((NUM_SENTENCES, num_predictions)),
    )
    return builders.sized_model(language_section, model_section), batch


def _params(model: Any) -> Any:
    return jax.eval_shape(builders.initializer(model, None), jax.random.key(0))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


def _expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{what}: {found} where {expected} is expected")
