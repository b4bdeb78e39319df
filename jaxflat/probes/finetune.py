"""Fine-tune a whole model and a new linear head on labelled sentences."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxflat.training.gradient import loss_and_gradient
from jaxflat.training.optimizers import Schedule
from jaxflat.training.step import TrainState, train_step

FeaturesFn = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""(params, tokens_NxT, lengths_N) -> features_NxF, the input of the head."""

SENTENCES_PER_PASS = 512  # in predictions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LabelledExamples:
    """Sentences with one set of labels: tokens_NxT, lengths_N, labels_N int32, valid_N bool.

    valid_N: which sentences have a label; the others have no effect.
    """

    tokens_NxT: jax.Array
    lengths_N: jax.Array
    labels_N: jax.Array
    valid_N: jax.Array


def init_head(key: jax.Array, num_features: int, num_classes: int) -> dict[str, jax.Array]:
    """Return a new head: kernel_FxC normal with variance 1 / F, bias_C zero."""
    kernel_FxC = jax.random.normal(key, (num_features, num_classes)) * num_features**-0.5
    return {"kernel": kernel_FxC, "bias": jnp.zeros(num_classes, jnp.float32)}


def finetune(
    features_fn: FeaturesFn,
    params: Any,
    train: LabelledExamples,
    key: jax.Array,
    rate: jax.Array | float,
    warmup_steps: jax.Array | int,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    batch_size: int,
    epochs: int,
) -> dict[str, Any]:
    """Return {"model": parameters, "head": {kernel_FxC, bias_C}} after training both.

    The loss is the cross-entropy of the labels in nats, the mean over a batch's valid sentences.
    The key sets the initial head and the order: one permutation of all sentences per epoch,
    concatenated and cut into epochs * N // batch_size batches. `optimizer` has learning rate 1; the
    schedule warms up linearly to `rate` and then stays constant.
    """
    head_key, order_key = jax.random.split(key)
    num_examples = len(train.labels_N)
    features = jax.eval_shape(features_fn, params, train.tokens_NxT[:1], train.lengths_N[:1])
    tuned = {"model": params, "head": init_head(head_key, features.shape[-1], num_classes)}
    num_steps = epochs * num_examples // batch_size
    schedule = Schedule(rate, warmup_steps, 0, num_steps)
    epoch_keys = jax.random.split(order_key, epochs)
    order_ExN = jax.vmap(lambda k: jax.random.permutation(k, num_examples))(epoch_keys)
    ids_SxB = order_ExN.reshape(-1)[: num_steps * batch_size].reshape(num_steps, batch_size)

    def loss_fn(tuned: Any, batch: LabelledExamples) -> tuple[jax.Array, jax.Array]:
        logits_BxC = _logits(features_fn, tuned, batch.tokens_NxT, batch.lengths_N)
        losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, batch.labels_N)
        valid_B = batch.valid_N.astype(losses_B.dtype)
        return (losses_B * valid_B).sum(), jnp.maximum(valid_B.sum(), 1)

    def step(state: TrainState, ids_B: jax.Array) -> tuple[TrainState, None]:
        batch = jax.tree.map(lambda x: x[ids_B], train)
        gradient_fn = partial(loss_and_gradient, loss_fn, batch)
        state, _ = train_step(state, schedule(state.step), gradient_fn, optimizer)
        return state, None

    start = TrainState(tuned, optimizer.init(tuned), jnp.zeros((), jnp.int32))
    return jax.lax.scan(step, start, ids_SxB)[0].params


def finetuned_correct(
    features_fn: FeaturesFn,
    params: Any,
    train: LabelledExamples,
    validation: LabelledExamples,
    test: LabelledExamples,
    key: jax.Array,
    rates_R: jax.Array,
    warmup_steps: jax.Array | int,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    batch_size: int,
    epochs: int,
) -> jax.Array:
    """Return correct_N, whether the fine-tuned model predicts each test sentence's label.

    One model is trained for each learning rate, with the same initial head and order; see
    `finetune`. The model with the highest accuracy on the validation sentences is tested, or the
    one with the smaller rate of two equal ones. Test labels have no effect on this choice.
    """

    def tune(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        tuned = finetune(
            *(features_fn, params, train, key, rate, warmup_steps, optimizer),
            num_classes=num_classes,
            batch_size=batch_size,
            epochs=epochs,
        )
        hits_N = predict(features_fn, tuned, validation) == validation.labels_N
        return (hits_N & validation.valid_N).sum(), predict(features_fn, tuned, test)

    hits_R, predicted_RxN = jax.lax.map(tune, rates_R)
    best = jnp.lexsort((rates_R, -hits_R))[0]
    return predicted_RxN[best] == test.labels_N


def predict(features_fn: FeaturesFn, tuned: Any, examples: LabelledExamples) -> jax.Array:
    """Return the most probable class of each sentence, predicted_N."""

    def predict_one(sentence: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits_1xC = _logits(features_fn, tuned, sentence[0][None], sentence[1][None])
        return jnp.argmax(logits_1xC[0])

    return jax.lax.map(
        predict_one, (examples.tokens_NxT, examples.lengths_N), batch_size=SENTENCES_PER_PASS
    )


def _logits(
    features_fn: FeaturesFn, tuned: Any, tokens_NxT: jax.Array, lengths_N: jax.Array
) -> jax.Array:
    features_NxF = features_fn(tuned["model"], tokens_NxT, lengths_N)
    return features_NxF @ tuned["head"]["kernel"] + tuned["head"]["bias"][None]
