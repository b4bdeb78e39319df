"""A lookup table of logits per context, plus a bias: cheap enough for thousands of estimates."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

CONTEXTS, V = 7, 5


@jax.jit
def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "table": jax.random.normal(keys[0], (CONTEXTS, V)),
        "bias": jax.random.normal(keys[1], (V,)),
    }


@partial(jax.jit, static_argnames=("num_microbatches", "batch_size"))
def make_batches(num_microbatches, batch_size, seed=1):
    shape = (num_microbatches, batch_size)
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "contexts": jax.random.randint(keys[0], shape, 0, CONTEXTS),
        "targets": jax.random.randint(keys[1], shape, 0, V),
        "weights": jax.random.bernoulli(keys[2], 0.9, shape).astype(jnp.float64),
    }


def logits_fn(params, batch):
    # tanh: a curved model, so that the Hessian and the Gauss-Newton matrix differ
    return jnp.tanh(params["table"])[batch["contexts"]] + params["bias"][None]


def log_probs_fn(params, batch):
    return jax.nn.log_softmax(logits_fn(params, batch)), batch["weights"]


def loss_fn(params, batch):
    log_probs, weights = log_probs_fn(params, batch)
    losses = -jnp.take_along_axis(log_probs, batch["targets"][:, None], axis=1)[:, 0]
    return jnp.sum(weights * losses), weights.sum()


@jax.jit
def dense_hessian(params, batches):
    flat, unravel = ravel_pytree(params)
    batch = jax.tree.map(lambda x: x.reshape(-1), batches)

    def mean_loss(flat):
        loss_sum, weight = loss_fn(unravel(flat), batch)
        return loss_sum / weight

    return jax.hessian(mean_loss)(flat)


@jax.jit
def dense_gauss_newton(params, batches):
    flat, unravel = ravel_pytree(params)
    batch = jax.tree.map(lambda x: x.reshape(-1), batches)
    scores_BxVxP = jax.jacfwd(lambda flat: log_probs_fn(unravel(flat), batch)[0])(flat)
    probs = jnp.exp(log_probs_fn(params, batch)[0]) * batch["weights"][:, None]
    return jnp.einsum("bv,bvi,bvj->ij", probs, scores_BxVxP, scores_BxVxP) / batch["weights"].sum()
