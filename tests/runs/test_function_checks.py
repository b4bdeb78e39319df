"""Each user's function is called once before training; one line describes its fault."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from jaxflat.config import custom, validation
from jaxflat.flatness import Estimate
from jaxflat.languages.hmm import Hmm, random_hmm
from jaxflat.runs.function_checks import check_functions
from tests.support.sweeps import tiny_config


class Words(nn.Module):
    """Predicts a word from the token at its place only."""

    num_words: int
    width: int

    @nn.compact
    def __call__(self, tokens_BxT, lengths_B, positions_BxM=None):
        hidden_BxTxD = nn.Embed(self.num_words + 3, self.width)(tokens_BxT)
        if positions_BxM is not None:
            hidden_BxTxD = jnp.take_along_axis(hidden_BxTxD, positions_BxM[:, :, None], axis=1)
        return nn.Dense(self.num_words)(hidden_BxTxD), {"features_BxMxD": hidden_BxTxD}


class Leaky(Words):
    """Adds the mean over all positions, padding included."""

    @nn.compact
    def __call__(self, tokens_BxT, lengths_B, positions_BxM=None):
        hidden_BxTxD = nn.Embed(self.num_words + 3, self.width)(tokens_BxT)
        hidden_BxTxD += hidden_BxTxD.mean(1, keepdims=True)
        if positions_BxM is not None:
            hidden_BxTxD = jnp.take_along_axis(hidden_BxTxD, positions_BxM[:, :, None], axis=1)
        return nn.Dense(self.num_words)(hidden_BxTxD), {"features_BxMxD": hidden_BxTxD}


class WordsEverywhere(Words):
    """Ignores the positions asked for."""

    @nn.compact
    def __call__(self, tokens_BxT, lengths_B, positions_BxM=None):
        hidden_BxTxD = nn.Embed(self.num_words + 3, self.width)(tokens_BxT)
        return nn.Dense(self.num_words)(hidden_BxTxD), {"features_BxMxD": hidden_BxTxD}


class NextWords(nn.Module):
    """Predicts the next symbol from the word before it."""

    num_words: int
    width: int
    first: int = -1  # the word that prediction 0 reads; before the first one there is none

    @nn.compact
    def __call__(self, tokens_BxT, lengths_B, positions_BxM=None):
        start = self.num_words + 2
        tokens_BxS = jnp.pad(tokens_BxT, ((0, 0), (1, 1)), constant_values=start)
        hidden_BxSxD = nn.Embed(self.num_words + 3, self.width)(tokens_BxS)[:, self.first + 1 :]
        logits_BxSxU = nn.Dense(self.num_words + 1)(hidden_BxSxD)
        if positions_BxM is None:
            return logits_BxSxU, {"features_BxMxD": hidden_BxSxD[:, 1 : tokens_BxT.shape[1] + 1]}
        logits_BxMxU, hidden_BxMxD = (
            jnp.take_along_axis(x, positions_BxM[:, :, None], axis=1)
            for x in (logits_BxSxU, hidden_BxSxD)
        )
        return logits_BxMxU, {"features_BxMxD": hidden_BxMxD}


class OwnWords(NextWords):
    """Reads the word that it predicts."""

    first: int = 0


def small_hmm(seed, num_states=3):
    sizes = {"num_states": num_states, "num_words": 6, "length": 4, "min_length": 2, "tasks": (2,)}
    return random_hmm(seed, **sizes, transition_concentration=1.0, emission_concentration=1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaking(Hmm):
    """Its conditionals sum to 1/e."""

    def conditional_log_probs(self, *args, **kwargs):
        return super().conditional_log_probs(*args, **kwargs) - 1.0


def leaking_hmm(seed):
    return Leaking(**vars(small_hmm(seed)))


def signs(momentum=0.9):
    return optax.chain(optax.trace(momentum), optax.scale_by_sign(), optax.scale(-1.0))


def growing():
    """The state has another shape after each step."""
    return optax.GradientTransformation(
        lambda params: jnp.zeros(1),
        lambda updates, state, params: (updates, jnp.concatenate([state, state])),
    )


def entropy(apply_fn):
    def loss_fn(params, batch):
        words = (batch.inputs_BxT, batch.lengths_B, batch.positions_BxM)
        logits_BxMxV, _ = apply_fn({"params": params}, *words)
        losses_BxM = optax.softmax_cross_entropy(logits_BxMxV, batch.targets_BxMxV)
        return (losses_BxM * batch.weights_BxM).sum(), batch.weights_BxM.sum()

    return loss_fn


def not_summed(apply_fn):
    return lambda params, batch: (batch.weights_BxM, batch.weights_BxM)


def squared_norm(problem):
    total = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(problem.params))
    return Estimate(total, jnp.zeros(()), 2, "probes")


def number(problem):
    return 1.0


def broken(problem):
    return problem.no_such_name


def majority(labels_N, test_features_MxF):
    return np.full(len(test_features_MxF), np.bincount(labels_N).argmax())


def one_label(labels_N):
    return labels_N[0]


def checked(change):
    config = tiny_config()
    config.update({"init_seed": 0, "probe_seed": 0})
    change(config)
    check_functions(FrozenConfigDict(validation.validate(config)))


def choose(section: str, function, chosen_by: str = "name"):
    """Return a change of a config that chooses a function in a section."""

    def change(config):
        place = config
        for name in section.split("."):
            place = place[name]
        place.own = custom(function)
        if chosen_by:
            place[chosen_by] = ("own",) if chosen_by == "measures" else "own"

    return change


OPTIMIZER, PHASE = "phases.pretrain.optimizer", "phases.pretrain"


def causal(change):
    def both(config):
        config.language.masking = "causal"
        change(config)

    return both


def test_a_causal_model_reads_earlier_words_only():
    checked(causal(choose("model", NextWords)))
    with pytest.raises(ValueError, match=r"model\.own: a word changes the logits of its own or an"):
        checked(causal(choose("model", OwnWords)))


def test_a_language_without_the_next_symbol_is_no_causal_one():
    def only_masked(seed):
        hmm = small_hmm(seed)
        names = ("num_words", "max_length", "tasks", "sample", "conditional_log_probs")
        return types.SimpleNamespace(**{name: getattr(hmm, name) for name in names})

    change = causal(choose("language", only_masked))
    with pytest.raises(
        ValueError, match=r"language\.own: .*='causal' needs a method next_log_probs"
    ):
        checked(change)


@pytest.mark.parametrize(
    ("section", "function", "chosen_by"),
    [
        ("model", Words, "name"),
        ("language", small_hmm, "name"),
        (OPTIMIZER, signs, "name"),
        (OPTIMIZER, optax.adabelief, "name"),
        (PHASE, entropy, "objective"),
        ("flatness", squared_norm, "measures"),
        ("probes", majority, ""),
    ],
)
def test_one_that_works_passes(section, function, chosen_by):
    checked(choose(section, function, chosen_by))


@pytest.mark.parametrize(
    ("section", "function", "chosen_by", "message"),
    [
        ("model", WordsEverywhere, "name", r"model\.own: logits_BxMxV with positions_BxM given"),
        ("model", Leaky, "name", r"model\.own: padding changes the logits .* by "),
        ("language", leaking_hmm, "name", r"language\.own: .*probabilities sum to 0\.367"),
        (OPTIMIZER, growing, "name", r"pretrain\.optimizer\.own: update: the new state"),
        (PHASE, not_summed, "objective", r"phases\.pretrain\.own: loss_fn\(params, batch\)"),
        ("flatness", number, "measures", r"flatness\.own: returns float; .* an Estimate"),
        (
            "flatness",
            broken,
            "measures",
            r"flatness\.own: AttributeError: .*_checks\.py, line \d+\)",
        ),
        ("probes", one_label, "", r"probes\.own: the labels: \(\) where \(4,\) is expected"),
    ],
)
def test_one_that_does_not_is_named(section, function, chosen_by, message):
    with pytest.raises(ValueError, match=message):
        checked(choose(section, function, chosen_by))
