"""The workload to time: the shape of a model and its batches, as a config of an ordinary run."""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxflat import config as base_config
from jaxflat.benchmark.languages import FULL
from jaxflat.config import Config
from jaxflat.languages.sentences import is_word
from jaxflat.runs.languages import make_language
from jaxflat.sweeps import points

ENDLESS = 10**9  # steps: the learning rate is constant during any measurement


@dataclass(frozen=True)
class Shape:
    """A transformer, and batches of sentences of at most `length` words, one of them masked.

    language: "hmm", whose sentences all have `length` words, or "pcfg", the paper's kind of
    grammar, whose sentences have at least 5.
    """

    width: int
    layers: int
    head_size: int
    batch: int
    length: int
    words: int
    language: str = "hmm"


def resolved_config(shape: Shape, together: int = 1, penalty_strength: float = 0.0) -> Config:
    """Return the resolved config of a run of this shape: sampled targets and AdamW.

    together: how many such runs one program trains. penalty_strength: of the Gauss-Newton trace.

    Raises InputError if no run can have this shape.
    """
    config = base_config.base()
    config.language.name, length = shape.language, shape.length
    # Tasks are not used, but a language needs one.
    hmm = {"num_words": shape.words, "length": length, "min_length": length, "tasks": (1,)}
    config.language.hmm.update(hmm)
    pcfg = {"num_words": shape.words, "length": length, "tasks": ((),)}
    config.language.pcfg.update(FULL | pcfg)
    config.model.update(width=shape.width, num_layers=shape.layers, head_size=shape.head_size)
    config.phases.pretrain.update(targets="sampled", batch_size=shape.batch, steps=ENDLESS)
    config.phases.pretrain.flatness_penalty.strength = penalty_strength
    config.training.together = together
    config.evaluation.update(num_sentences=2 * shape.batch, batch_size=shape.batch)
    config.flatness.update(num_microbatches=4, microbatch_size=shape.batch)
    (point,) = points.expand(config, [{}], Path())
    return point.config


@functools.cache
def sample_sentences(shape: Shape, number: int) -> np.ndarray:
    """Return words_NxT of sentences of the workload's language, with -1 after their ends."""
    language = make_language(resolved_config(shape).language)
    sentences = jax.jit(language.sample, static_argnums=1)(jax.random.key(0), number)
    tokens_NxT = np.asarray(sentences.tokens_BxT)
    return np.where(is_word(sentences.lengths_B, tokens_NxT.shape[1]), tokens_NxT, -1)


def step_flops(shape: Shape, words_NxT: np.ndarray) -> float:
    """Return the floating-point operations of the matrix products of a step on B sentences.

    words_NxT: examples of the sentences, as of `sample_sentences`. Padding does not count. A
    product of (m, k) with (k, n) takes 2 m k n. Forward, for a sentence of T words, width D:
      each block but the last    T (6 D^2 + 2 D^2 + 16 D^2) for q, k, v, for the output and for
                                 the MLP, and 4 T T D for scores and mixing over all heads;
      the last block             T 4 D^2 for keys and values, and at the masked position
                                 2 D^2 + 2 D^2 + 16 D^2 + 4 T D for the rest;
      the decoder                2 D V.
    The reverse pass has two products of the same size for each of these, hence times 3. Sampling,
    norms, softmax, GELU and the optimizer do not count, because they are not matrix products.
    """
    D, V, lengths_N = shape.width, shape.words, (words_NxT >= 0).sum(1)
    full_block_N = lengths_N * (24 * D * D + 4 * lengths_N * D)
    last_block_N = lengths_N * 4 * D * D + 20 * D * D + 4 * lengths_N * D
    sentence = ((shape.layers - 1) * full_block_N + last_block_N).mean() + 2 * D * V
    return 3 * shape.batch * float(sentence)
