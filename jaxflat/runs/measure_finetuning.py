"""Measure a checkpoint's accuracy on the tasks after fine-tuning on labelled sentences."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxflat.config import Config
from jaxflat.distributed import sharding
from jaxflat.probes.features import sentence_features
from jaxflat.probes.finetune import LabelledExamples, finetuned_correct
from jaxflat.runs import builders
from jaxflat.runs.measurements import Estimates, PartialResults
from jaxflat.runs.probe_estimates import accuracy_estimate
from jaxflat.runs.probe_sets import LabelledSet, ProbeSets
from jaxflat.training.optimizers import make_optimizer


def finetuned_accuracies(
    config: Config, model: Any, params: Any, sets: ProbeSets, partial_results: PartialResults
) -> Estimates:
    """Return the accuracy of each task and labeling; each is fine-tuned separately.

    Each pair of a draw and a label set is one job. If the number of jobs is a multiple of the
    number of devices, each device runs one job of a compiled call. Otherwise a call has one job.
    """
    settings, mesh = config.probes.finetune, builders.make_mesh(config)
    shape = (settings.num_draws, len(sets.names))
    num_jobs = shape[0] * shape[1]
    width = mesh.size if num_jobs % mesh.size == 0 else 1
    key = builders.purpose_key(config.probe_seed, "finetune")

    def correct(first: int) -> list:
        jobs = np.unravel_index(np.arange(first, first + width), shape)
        correct_WxN = _correct(
            model,
            mesh,
            settings,
            sets.num_classes,
            params,
            *(sets.finetune, sets.validation, sets.test),
            key,
            jnp.asarray(settings.learning_rates),
            settings.warmup_steps,
            *map(jnp.asarray, jobs),
        )
        return sharding.to_host(sharding.replicate(mesh, correct_WxN)).tolist()

    name = f"{sets.names[0]}/finetune_{{}}_of_{width}"
    calls = [
        partial_results.value(name.format(first), functools.partial(correct, first))
        for first in range(0, num_jobs, width)
    ]
    correct_DxKxN = jnp.asarray(calls).reshape(*shape, -1)
    return {
        f"finetune/{name}": accuracy_estimate(correct_DxKxN[:, k], sets.test[2][k])
        for k, name in enumerate(sets.names)
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _correct(
    model: Any,
    mesh: Mesh,
    settings: Config,
    num_classes: int,
    params: Any,
    train: LabelledSet,
    validation: LabelledSet,
    test: LabelledSet,
    key: jax.Array,
    rates_R: jax.Array,
    warmup_steps: jax.Array,
    draws_W: jax.Array,
    sets_W: jax.Array,
) -> jax.Array:
    """Return correct_WxN of W jobs, which run in parallel on the devices.

    A job's key depends on its draw only. So the label sets of a draw share sentences, initial
    parameters and order.
    """
    optimizer = make_optimizer("adamw", settings.adamw)

    def features_fn(params: Any, tokens_NxT: jax.Array, lengths_N: jax.Array) -> jax.Array:
        return sentence_features(model.apply, params, tokens_NxT, lengths_N, settings.pooling)

    def job(params: Any, draw: jax.Array, k: jax.Array) -> jax.Array:
        return finetuned_correct(
            features_fn,
            params,
            _examples(jax.tree.map(lambda x: x[draw], train), k),
            _examples(validation, k),
            _examples(test, k),
            jax.random.fold_in(key, draw),
            rates_R,
            warmup_steps,
            optimizer,
            num_classes=num_classes,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
        )

    width = len(draws_W)
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (width, *x.shape)), params)
    arguments = (copies, draws_W, sets_W)
    if width > 1:
        arguments = sharding.shard_examples(mesh, arguments)
    return jax.vmap(job)(*arguments)


def _examples(part: LabelledSet, k: jax.Array) -> LabelledExamples:
    sentences, labels_KxN, valid_KxN = part
    return LabelledExamples(sentences.tokens_BxT, sentences.lengths_B, labels_KxN[k], valid_KxN[k])
