"""Train a causal language model on texts; save it in the format of a downloaded GPT-2.

Each text is a separate sequence between two marks. Both marks are the same special token.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxflat.config import Config
from jaxflat.console import Display
from jaxflat.datasets.tokenizer import encode, train_tokenizer
from jaxflat.distributed import preemption, sharding
from jaxflat.models.causal import CausalTransformer
from jaxflat.models.huggingface import save_causal
from jaxflat.training.gradient import Division
from jaxflat.training.objectives import causal_lm_loss, causal_losses
from jaxflat.training.optimizers import Schedule, make_optimizer
from jaxflat.training.step import Objective, TrainState, make_train_steps

MARK = "<|endoftext|>"  # its id follows the last one of the trained tokenizer
# Without it transformers would replace tokenizer.json's handling of text by GPT-2's.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": MARK,
    "eos_token": MARK,
}
STEPS_PER_CALL = 100  # between two measurements of the validation loss
MIN_TEXTS = 20
MAX_VALIDATION = 2048  # most texts held out, of 5% of all


class TextBatch(NamedTuple):
    """Texts of T tokens, int32: a mark, the text, a mark if it fits, then padding of any token.

    lengths_B counts text and marks, without the padding.
    """

    tokens_BxT: jax.Array | np.ndarray
    lengths_B: jax.Array | np.ndarray


class Best(NamedTuple):
    """The parameters with the lowest validation loss (nats per token), and their step."""

    params: Any
    step: int
    loss: float
    sem: float


def train_teacher(
    folder: Path, texts: Sequence[str], settings: Config, seed: int, display: Display
) -> Path:
    """Train a model and its tokenizer on texts and return their new folder.

    The folder holds the checkpoint, tokenizer.json, and teacher.json with settings, seed and
    validation loss. On the same devices all bytes are a function of texts, settings and seed.
    Raises ValueError of one line if the folder exists or the texts are too few. Raises
    FloatingPointError if training diverges, and Preempted on a signal. After an error there is no
    folder.
    """
    if folder.exists():
        raise ValueError(f"{folder}: the folder already exists")
    if len(texts) < MIN_TEXTS:
        raise ValueError(f"a teacher needs at least {MIN_TEXTS} texts; got {len(texts)}")
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    tokenizer.add_special_tokens([MARK])
    mark = settings.vocabulary
    split_key, init_key, batch_key = jax.random.split(jax.random.key(seed), 3)
    marked = mark_texts(encode(tokenizer, texts), mark, settings.length)
    training, validation = split_texts(marked, split_key)
    model = CausalTransformer(
        num_tokens=mark + 1,
        max_length=settings.length,
        width=settings.width,
        num_layers=settings.num_layers,
        num_heads=settings.width // settings.head_size,
        mlp_width=4 * settings.width,
        activation="gelu",
    )
    initialize = jax.jit(partial(model.init, method="next_logits"))
    params = initialize(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
    best = _train(model, params, training, validation, settings, batch_key, display)
    record = {
        "settings": settings.to_dict(),
        "seed": seed,
        "num_tokens": mark + 1,
        "validation_loss": best.loss,
        "validation_loss_sem": best.sem,
        "step": best.step,
        "training_texts": len(training.lengths_B),
        "training_tokens": int((training.lengths_B - 1).sum()),
        "validation_texts": len(validation.lengths_B),
        "validation_tokens": int((validation.lengths_B - 1).sum()),
    }
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=1) + "\n",
        "teacher.json": json.dumps(record, indent=1, sort_keys=True) + "\n",
    }
    return save_causal(folder, model, best.params, mark, mark, files)


def mark_texts(encoded: Sequence[Any], mark: int, length: int) -> TextBatch:
    """Return texts, given as token ids, between marks and cut to T = length + 1 tokens."""
    tokens_NxT = np.full((len(encoded), length + 1), mark, np.int32)
    lengths_N = np.empty(len(encoded), np.int32)
    for place, ids in enumerate(encoded):
        marked = [mark, *ids, mark][: length + 1]
        tokens_NxT[place, : len(marked)] = marked
        lengths_N[place] = len(marked)
    return TextBatch(tokens_NxT, lengths_N)


def split_texts(texts: TextBatch, key: jax.Array) -> tuple[TextBatch, TextBatch]:
    """Return (training, validation): a random twentieth, or MAX_VALIDATION, is held out."""
    num_texts = len(texts.lengths_B)
    order_N = np.asarray(jax.random.permutation(key, num_texts))
    num_held_out = min(num_texts // 20, MAX_VALIDATION)
    held_out, rest = np.sort(order_N[:num_held_out]), np.sort(order_N[num_held_out:])
    return TextBatch(*(x[rest] for x in texts)), TextBatch(*(x[held_out] for x in texts))


def _train(
    model: CausalTransformer,
    params: Any,
    training: TextBatch,
    validation: TextBatch,
    settings: Config,
    key: jax.Array,
    display: Display,
) -> Best:
    batch_size, num_steps = settings.batch_size, settings.steps
    num_data = max(n for n in range(1, jax.local_device_count() + 1) if batch_size % n == 0)
    mesh = sharding.make_mesh(num_data, devices=jax.local_devices())  # rank 0 trains it

    def sample_batch(texts: TextBatch, key: jax.Array, _: jax.Array) -> TextBatch:
        rows_B = jax.random.randint(key, (batch_size,), 0, len(texts.lengths_B))
        return sharding.shard_examples(mesh, TextBatch(*(x[rows_B] for x in texts)))

    optimizer = make_optimizer("adamw", {"weight_decay": settings.weight_decay})
    num_shards = num_data if jax.default_backend() == "cpu" else 1
    loss_fn = causal_lm_loss(partial(model.apply, method="next_logits"))
    objective = Objective(loss_fn, division=Division(num_shards))
    steps = make_train_steps(objective, sample_batch, optimizer)
    warmup_steps = settings.warmup_steps
    decay_steps = num_steps - warmup_steps
    schedule = Schedule(settings.learning_rate, warmup_steps, decay_steps, num_steps)
    evaluate = _evaluator(model, validation, batch_size, mesh)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    state, texts = sharding.replicate(mesh, (state, training))
    best = None
    display.start_stage("teacher", num_steps)
    for stop in (*range(STEPS_PER_CALL, num_steps, STEPS_PER_CALL), num_steps):
        preemption.stop_if_requested()
        state, mean_loss = steps(state, texts, key, schedule, 0, stop)
        loss, sem = evaluate(state.params)
        if not math.isfinite(mean_loss) or not math.isfinite(loss):
            raise FloatingPointError(f"the teacher's loss is {float(mean_loss)} at step {stop}")
        if best is None or loss < best.loss:
            best = Best(jax.device_get(state.params), stop, loss, sem)
        display.advance_stage(stop, f"teacher  loss {mean_loss:.3f}, validation {loss:.3f}")
    assert best is not None
    return best


def _evaluator(
    model: CausalTransformer, texts: TextBatch, batch_size: int, mesh: Mesh
) -> Callable[[Any], tuple[float, float]]:
    """Return evaluate(params) -> (nats per token, its standard error over texts)."""
    num_texts = len(texts.lengths_B)
    rows = np.arange(-(-num_texts // batch_size) * batch_size) % num_texts
    slices = TextBatch(*(x[rows].reshape(-1, batch_size, *x.shape[1:]) for x in texts))
    slices = sharding.replicate(mesh, slices)
    apply_fn = partial(model.apply, method="next_logits")

    @jax.jit
    def losses(params: Any, slices: TextBatch) -> tuple[jax.Array, jax.Array]:
        def of_slice(batch: TextBatch) -> tuple[jax.Array, jax.Array]:
            return causal_losses(apply_fn, params, sharding.shard_examples(mesh, batch))

        return jax.lax.map(of_slice, slices)

    def evaluate(params: Any) -> tuple[float, float]:
        found = (x.ravel()[:num_texts] for x in jax.device_get(losses(params, slices)))
        losses_N, weights_N = (x.astype(np.float64) for x in found)
        loss = losses_N.sum() / weights_N.sum()
        errors_N = losses_N - loss * weights_N
        variance = (errors_N**2).sum() * num_texts / max(num_texts - 1, 1)
        return float(loss), float(math.sqrt(variance) / weights_N.sum())

    return evaluate
