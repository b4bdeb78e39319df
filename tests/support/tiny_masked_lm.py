"""A real masked language model small enough for dense matrices, on ragged random sentences."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxflat.languages.sentences import mask_id
from jaxflat.models.transformer import Transformer

V, T, P = 6, 5, 2  # words, longest sentence, masked positions per sentence
MODEL = Transformer(
    num_words=V, max_length=T, width=4, num_layers=3, num_heads=2, tied_decoder=False
)


def is_stacked(path):
    return path.startswith("stack/")


@jax.jit
def make_params(seed=0):
    """Parameters far from any initialisation, biases and norms included."""
    batch = jax.tree.map(lambda x: x[0], make_batches(1, 2))
    key = jax.random.key(seed)
    inputs = batch["tokens"], batch["lengths"], batch["positions"]
    shapes = jax.eval_shape(MODEL.init, key, *inputs)["params"]
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes))
    return unravel(0.5 * jax.random.normal(key, flat.shape))


@partial(jax.jit, static_argnames=("num_microbatches", "batch_size"))
def make_batches(num_microbatches, batch_size, seed=1):
    """Microbatches with ragged lengths and unequal numbers of predictions."""
    shape = (num_microbatches, batch_size)
    keys = jax.random.split(jax.random.key(seed), 5)
    lengths = jax.random.randint(keys[0], shape, P, T + 1)
    words = jax.random.randint(keys[1], (*shape, T), 0, V)
    words = jnp.where(jnp.arange(T)[None, None, :] < lengths[..., None], words, V)
    start = jax.random.randint(keys[2], shape, 0, lengths - P + 1)
    positions = start[..., None] + jnp.arange(P)[None, None, :]
    masked = (jnp.arange(T)[None, None, :, None] == positions[..., None, :]).any(-1)
    second = jax.random.bernoulli(keys[3], 0.5, shape).astype(float)
    return {
        "tokens": jnp.where(masked, mask_id(V), words),
        "lengths": lengths,
        "positions": positions,
        "weights": jnp.stack([jnp.ones(shape), second], axis=-1),
        "targets": jax.random.dirichlet(keys[4], jnp.ones(V), (*shape, P)),
    }


def logits_fn(params, batch):
    variables = {"params": params}
    return MODEL.apply(variables, batch["tokens"], batch["lengths"], batch["positions"])[0]


def log_probs_fn(params, batch):
    return jax.nn.log_softmax(logits_fn(params, batch)), batch["weights"]


def loss_fn(params, batch):
    log_probs, weights = log_probs_fn(params, batch)
    losses = -jnp.sum(batch["targets"] * log_probs, axis=-1)
    return jnp.sum(weights * losses), weights.sum()


def merge(batches):
    """The same sentences as one batch."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)


@jax.jit
def saturated(params, batches):
    """The batches with the model's own predictions as targets: it is then exactly optimal."""
    return {
        **batches,
        "targets": jnp.exp(jax.lax.map(lambda b: log_probs_fn(params, b)[0], batches)),
    }


@jax.jit
def dense_hessian(params, batches):
    flat, unravel = ravel_pytree(params)

    def mean_loss(flat):
        loss_sum, weight = loss_fn(unravel(flat), merge(batches))
        return loss_sum / weight

    return jax.hessian(mean_loss)(flat)


@jax.jit
def logits_jacobian(params, batch):
    """BxMxVxP, of one batch."""
    flat, unravel = ravel_pytree(params)
    return jax.jacfwd(lambda flat: logits_fn(unravel(flat), batch))(flat)


@jax.jit
def dense_gauss_newton(params, batches):
    """From the Jacobian of the logits and diag(p) - pp', each written out."""
    batch = merge(batches)
    jacobian = logits_jacobian(params, batch)
    probs = jnp.exp(log_probs_fn(params, batch)[0])
    weights = batch["weights"] / batch["weights"].sum()
    middle = jnp.eye(V)[None, None] * probs[..., None] - probs[..., None] * probs[..., None, :]
    return jnp.einsum("bm,bmvi,bmvw,bmwj->ij", weights, jacobian, middle, jacobian, optimize=True)


def diagonal_like(params, dense):
    """The diagonal of a dense matrix in the shape of the parameters."""
    return ravel_pytree(params)[1](jnp.diag(dense))
