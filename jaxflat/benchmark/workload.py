"""The workload to time: the shape of a model and its batches, as a config of an ordinary run."""

from dataclasses import dataclass
from pathlib import Path

from jaxflat import config as base_config
from jaxflat.config import Config
from jaxflat.sweeps import points

ENDLESS = 10**9  # steps: the learning rate is constant during any measurement


@dataclass(frozen=True)
class Shape:
    """A transformer, and batches of sentences of `length` words, one of them masked."""

    width: int
    layers: int
    head_size: int
    batch: int
    length: int
    words: int


def resolved_config(shape: Shape, together: int = 1, penalty_strength: float = 0.0) -> Config:
    """Return the resolved config of a run of this shape: sampled targets, AdamW, an HMM.

    together: how many such runs one program trains. penalty_strength: of the Gauss-Newton trace.

    Raises InputError if no run can have this shape.
    """
    config = base_config.base()
    config.language.hmm.num_words = shape.words
    config.language.hmm.length = config.language.hmm.min_length = shape.length
    config.language.hmm.tasks = (1,)  # not used, but a language needs one
    config.model.update(width=shape.width, num_layers=shape.layers, head_size=shape.head_size)
    config.phases.pretrain.update(targets="sampled", batch_size=shape.batch, steps=ENDLESS)
    config.phases.pretrain.flatness_penalty.strength = penalty_strength
    config.training.together = together
    config.evaluation.update(num_sentences=2 * shape.batch, batch_size=shape.batch)
    config.flatness.update(num_microbatches=4, microbatch_size=shape.batch)
    (point,) = points.expand(config, [{}], Path())
    return point.config


def step_flops(shape: Shape) -> int:
    """Return the floating-point operations of one training step's matrix products.

    A product of (m, k) with (k, n) takes 2 m k n. Forward, for B sentences of T words, width D:
      each block but the last    B T (6 D^2 + 2 D^2 + 16 D^2) for q, k, v, for the output and for
                                 the MLP, and 4 B T T D for scores and mixing over all heads;
      the last block             B T 4 D^2 for keys and values, and at the B masked positions
                                 B (2 D^2 + 2 D^2 + 16 D^2 + 4 T D) for the rest;
      the decoder                2 B D V.
    The reverse pass has two products of the same size for each of these, hence times 3. Sampling,
    norms, softmax, GELU and the optimizer do not count, because they are not matrix products.
    """
    B, T, D, V = shape.batch, shape.length, shape.width, shape.words
    full_block = B * T * (24 * D * D + 4 * T * D)
    last_block = B * T * 4 * D * D + B * (20 * D * D + 4 * T * D)
    return 3 * ((shape.layers - 1) * full_block + last_block + 2 * B * D * V)
