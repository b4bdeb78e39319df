"""How well a checkpoint does on the tasks after fine-tuning on labelled sentences."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxflat import experiment, sharding
from jaxflat.config import Config
from jaxflat.probes.features import sentence_features
from jaxflat.probes.finetune import Examples, finetuned_correct
from jaxflat.stages.estimates import accuracy_estimate
from jaxflat.stages.probe_sets import Part, ProbeSets
from jaxflat.stages.records import Record, record
from jaxflat.training.optimizers import make_optimizer
from jaxflat.trajectory import Snapshot


def finetune_records(
    config: Config, model: Any, params: Any, sets: ProbeSets, snapshot: Snapshot
) -> list[Record]:
    """Return the accuracy of each task and labeling, each fine-tuned by itself."""
    parts = (sets.finetune, sets.validation, sets.test)
    settings = config.probes.finetune
    key = experiment.purpose_key(config.probe_seed, "finetune")
    correct_DxKxN = _correct(
        model,
        experiment.make_mesh(config),
        settings,
        sets.num_classes,
        params,
        *parts,
        key,
        jnp.asarray(settings.learning_rates),
        settings.warmup_steps,
    )
    return [
        record(
            snapshot, f"finetune/{name}", accuracy_estimate(correct_DxKxN[:, k], sets.test[2][k])
        )
        for k, name in enumerate(sets.names)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _correct(
    model: Any,
    mesh: Mesh,
    settings: Config,
    num_classes: int,
    params: Any,
    train: Part,
    validation: Part,
    test: Part,
    key: jax.Array,
    rates_R: jax.Array,
    warmup_steps: jax.Array,
) -> jax.Array:
    """Return correct_DxKxN: every draw and label set is a job, and each device has jobs of its own.

    A job's key is that of its draw: label sets of a draw share sentences, start and order.
    """
    num_draws, num_sets = train[1].shape[:2]
    draws_J, sets_J = jnp.divmod(jnp.arange(num_draws * num_sets), num_sets)
    optimizer = make_optimizer("adamw", **settings.adamw)

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

    # As many jobs at a time as there are devices, where that comes out even.
    width = mesh.size if len(draws_J) % mesh.size == 0 else 1

    def side_by_side(jobs: tuple[jax.Array, jax.Array]) -> jax.Array:
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (width, *x.shape)), params)
        arguments = (copies, *jobs)
        if width > 1:
            arguments = sharding.shard_examples(mesh, arguments)
        return jax.vmap(job)(*arguments)

    jobs = (draws_J.reshape(-1, width), sets_J.reshape(-1, width))
    correct_GxWxN = jax.lax.map(side_by_side, jobs)
    return correct_GxWxN.reshape(num_draws, num_sets, -1)


def _examples(part: Part, k: jax.Array) -> Examples:
    sentences, labels_KxN, valid_KxN = part
    return Examples(sentences.tokens_BxT, sentences.lengths_B, labels_KxN[k], valid_KxN[k])
