"""A Hugging Face folder as the subject of `measure`: its loss on the texts of a file."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxflat import config as base_config
from jaxflat.config import Config, loading, validation
from jaxflat.config.validation import InputError
from jaxflat.datasets.tokenizer import (
    TokenTexts,
    load_tokenizer,
    read_token_texts,
    tokenizer_file,
)
from jaxflat.flatness import Problem
from jaxflat.languages.batches import Batch, OneHot
from jaxflat.languages.generated.teacher import TextBatch
from jaxflat.measure.subjects import Subject
from jaxflat.models.bert import Bert
from jaxflat.models.blocks import block_of, is_stacked, kind_of
from jaxflat.models.huggingface import load_model, read_model
from jaxflat.runs import builders, checks
from jaxflat.training.objectives import (
    causal_lm_loss,
    causal_log_probs,
    masked_lm_loss,
    masked_log_probs,
    self_labelled_loss,
)


class MaskedTexts(NamedTuple):
    """Texts with one hidden token each: words_Bx1 at positions_Bx1."""

    inputs_BxT: Any
    lengths_B: Any
    positions_Bx1: Any
    words_Bx1: Any


def text_subject(
    folder: Path, data: Path, max_length: int, seed: int, overrides: dict[str, Any]
) -> Subject:
    """Return a Hugging Face folder's model with its own loss on the texts of a file.

    A GPT-2 or OPT predicts every token but the first, a BERT one hidden token a text, uniform over
    its ordinary ones. Texts come in an order drawn from the seed. Labels come from the texts,
    or with flatness.labels="model" from the model. Raises ValueError of one line that names the
    file or the key that is wrong, before it reads the parameters.
    """
    config = validation.validate(loading.override(_texts_config(), overrides))
    if config.flatness.labels == "exact":
        raise InputError("flatness.labels='exact' is for a run's language; here: data, model")
    model = read_model(folder)
    texts = read_token_texts(data, folder, model.num_tokens, min(max_length, model.max_length))
    order_key, mask_key, key = jax.random.split(builders.purpose_key(seed, "measure"), 3)
    if isinstance(model, Bert):
        num_predictions = len(texts.lengths_N)
        examples: Any = mask_texts(mask_key, texts, mask_token(folder, model.num_tokens))
        loss_fn, log_probs_fn = masked_losses(model)
    else:
        if (texts.lengths_N < 2).any():
            line = np.argmin(texts.lengths_N) + 1
            raise InputError(f"{data}: line {line} has a single token; a prediction needs two")
        examples = TextBatch(texts.tokens_NxT, texts.lengths_N)
        num_predictions = int(texts.lengths_N.sum()) - len(texts.lengths_N)
        apply_fn = partial(model.apply, method="next_logits")
        loss_fn, log_probs_fn = causal_lm_loss(apply_fn), causal_log_probs(apply_fn)
    if config.flatness.labels == "model":
        loss_fn = self_labelled_loss(log_probs_fn)
    if config.flatness.remat:
        loss_fn, log_probs_fn = jax.checkpoint(loss_fn), jax.checkpoint(log_probs_fn)
    sample = _microbatches(order_key, examples, config.flatness, data)
    frozen: Config = FrozenConfigDict(config)
    checks.check_flatness(frozen.flatness)
    problem = Problem(
        loss_fn,
        log_probs_fn,
        None,  # see _at
        sample,
        key,
        num_predictions,
        groupings=(block_of, kind_of) if frozen.flatness.by_block else (),
        stacked=is_stacked,
    )
    chosen = frozen.flatness
    sizes = f"{chosen.num_microbatches} microbatches of {chosen.microbatch_size}"
    how = f"{sizes} of {len(texts.lengths_N):,} texts, labels {chosen.labels}"
    return _at(problem, frozen, how, folder)


def _at(problem: Problem, config: Config, how: str, folder: Path) -> Subject:
    """Return the subject of a folder's parameters, for a problem without parameters."""
    at = partial(_at, problem, config, how)
    own = problem._replace(params=load_model(folder).params)
    return Subject(own, config, folder.absolute().name, how, at)


def _texts_config() -> Config:
    config = base_config.base()
    config.flatness.labels = "data"
    return config


def mask_token(folder: Path, num_tokens: int) -> int:
    """Return the tokenizer's [MASK]; raise InputError unless it exists and the model knows it."""
    token, file = load_tokenizer(folder).token_to_id("[MASK]"), tokenizer_file(folder)
    if token is None:
        raise InputError(f"{file}: has no token [MASK]")
    if token >= num_tokens:
        raise InputError(f"{file}: [MASK] is token {token}; the model has 0..{num_tokens - 1}")
    return token


def mask_texts(key: jax.Array, texts: TokenTexts, mask_token: int) -> MaskedTexts:
    """Hide one ordinary token of each text."""
    scores_NxT = np.asarray(jax.random.uniform(key, texts.tokens_NxT.shape))
    positions_N = np.argmax(np.where(texts.ordinary_NxT, scores_NxT, -1), axis=1).astype(np.int32)
    rows_N = np.arange(len(positions_N))
    inputs_NxT = texts.tokens_NxT.copy()
    inputs_NxT[rows_N, positions_N] = mask_token
    words_N = texts.tokens_NxT[rows_N, positions_N]
    return MaskedTexts(inputs_NxT, texts.lengths_N, positions_N[:, None], words_N[:, None])


def masked_losses(model: Bert) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return a BERT's loss_fn and log_probs_fn of a batch of masked texts."""
    loss_fn, log_probs_fn = masked_lm_loss(model.apply), masked_log_probs(model.apply)

    def batch(texts: MaskedTexts) -> Batch:
        weights_Bx1 = jax.numpy.ones(texts.words_Bx1.shape)
        return Batch(*texts[:3], OneHot(texts.words_Bx1, model.num_tokens), weights_Bx1)

    return lambda p, b: loss_fn(p, batch(b)), lambda p, b: log_probs_fn(p, batch(b))


def _microbatches(
    key: jax.Array, examples: Any, settings: Config, data: Path
) -> Callable[[int], Any]:
    """Return rounds of microbatches, each text in at most one; set the sizes in `settings`."""
    num_texts = len(examples[0])
    num_microbatches = min(settings.num_microbatches, num_texts)
    if num_microbatches < 2:
        raise InputError(f"{data}: one text; errors need two or more")
    size = min(settings.microbatch_size, num_texts // num_microbatches)
    num_rounds = min(settings.max_rounds, num_texts // (num_microbatches * size))
    settings.update(num_microbatches=num_microbatches, microbatch_size=size, max_rounds=num_rounds)
    order_N = np.asarray(jax.random.permutation(key, num_texts))
    used = order_N[: num_rounds * num_microbatches * size].reshape(num_rounds, -1, size)
    return lambda i: jax.tree.map(lambda x: jax.numpy.asarray(x[used[i]]), examples)
