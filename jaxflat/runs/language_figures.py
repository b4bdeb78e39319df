"""What a language asks of a model: how much context tells, and how hard its tasks are."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxflat.flatness import Estimate, ratio_estimate
from jaxflat.languages.batches import make_questions
from jaxflat.languages.tasks import posteriors

BATCH = 64  # sentences at a time: large grammars compile much longer for larger batches


class TaskFigures(NamedTuple):
    """The best accuracy on latent labels with and without the words, where the task exists.

    bayes: E[max_c p(c | x)]. majority: max_c p(c). exists: the share of sentences with a label.
    """

    bayes: Estimate
    majority: Estimate
    exists: Estimate


class LanguageFigures(NamedTuple):
    """The entropy of a predicted symbol, in nats, with its context and without.

    conditional: E[H(x_t | context)], the optimum of the loss. unigram: H(x_t). context: their
    difference, the mutual information E[KL(p(x_t | context) || p(x_t))].
    """

    conditional: Estimate
    unigram: Estimate
    context: Estimate
    tasks: dict[str, TaskFigures]


def measure_language(
    language: Any, masking: str, key: jax.Array, *, num_sentences: int
) -> LanguageFigures:
    """Estimate a language's entropies and the accuracies that its tasks allow.

    num_sentences: rounded up to whole batches. Each figure is a mean of exact conditionals or
    posteriors over sentences. p(x_t) and p(c) are estimated from the same sentences. This biases
    the unigram entropy by O(1 / num_sentences), and a majority upwards by about its SEM.
    """
    keys = jax.random.split(key, -(-num_sentences // BATCH))
    by_sentence = _by_sentence(language, keys, masking)
    entropy_S, probs_SxV, weights_S, tasks = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), by_sentence
    )
    mean = partial(ratio_estimate, over="sentences")
    unigram_V = probs_SxV.sum(axis=0) / weights_S.sum()
    # E[q] = p, so E[-q log p] = H(p); its linearised error is that of H at the estimated p.
    cross_S = -jax.scipy.special.xlogy(probs_SxV, unigram_V[None]).sum(axis=1)
    figures = {}
    for name in language.tasks:  # in its order; a compiled function sorts them
        posterior_SxC, valid_S = tasks[name]
        kept_SxC = posterior_SxC * valid_S[:, None]
        figures[name] = TaskFigures(
            bayes=mean(kept_SxC.max(axis=1), valid_S),
            majority=mean(kept_SxC[:, kept_SxC.sum(axis=0).argmax()], valid_S),
            exists=mean(valid_S, jnp.ones_like(valid_S)),
        )
    return LanguageFigures(
        conditional=mean(entropy_S, weights_S),
        unigram=mean(cross_S, weights_S),
        context=mean(cross_S - entropy_S, weights_S),
        tasks=figures,
    )


@partial(jax.jit, static_argnames="masking")
def _by_sentence(language: Any, keys: jax.Array, masking: str) -> Any:
    """Return sums over the hidden words of each sentence, and (posterior, valid) of its tasks."""

    def batch(key: jax.Array) -> Any:
        sentence_key, mask_key = jax.random.split(key)
        sentences = language.sample(sentence_key, BATCH)
        asked = make_questions(language, mask_key, sentences, masking)
        weights_SxRxM, log_probs_SxRxMxV = asked.weights_SxRxM, asked.log_probs_SxRxMxV
        assert log_probs_SxRxMxV is not None  # asked only of languages with a known optimum
        probs_SxRxMxV = weights_SxRxM[..., None] * jnp.exp(log_probs_SxRxMxV)
        tasks = language.tasks
        found = {
            name: (posterior_SxC, tasks[name].labels(sentences)[1].astype(posterior_SxC.dtype))
            for name, posterior_SxC in posteriors(tasks, sentences).items()
        }
        entropy_S = -(probs_SxRxMxV * log_probs_SxRxMxV).sum((1, 2, 3))
        return entropy_S, probs_SxRxMxV.sum((1, 2)), weights_SxRxM.sum((1, 2)), found

    return jax.lax.map(batch, keys)
