"""Fit linear probes: multinomial logistic regression on frozen features, many fits in one call."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LabelledFeatures:
    """Features with K sets of labels (tasks and labelings); leading axes may be added.

    features_NxF; labels_KxN int32; valid_KxN bool: which sentences each task can use.
    """

    features_NxF: jax.Array
    labels_KxN: jax.Array
    valid_KxN: jax.Array


def fit_linear_probes(
    train: LabelledFeatures, l2_L: jax.Array, *, num_classes: int, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """Fit K label sets times L penalties on the same features; return (kernels, biases).

    Each fit minimises mean_n CE(softmax(x_n W + b), y_n) + l2 / 2 |W|^2, in nats, over features
    centred and scaled to a mean squared norm of 1. The returned kernels_KxLxFxC and biases_KxLxC
    apply to the original features.

    The method is Nesterov's with restarts (O'Donoghue & Candes 2015), in the eigenbasis of the
    features. The bound Hessian <= 1/2 X'X (Boehning 1992) preconditions it, so it needs no line
    search.
    """
    mean_F = train.features_NxF.mean(0)
    centred_NxF = train.features_NxF - mean_F[None, :]
    scale = jnp.sqrt((centred_NxF**2).sum(1).mean()) + 1e-12
    coordinates_NxR, rotation_FxR = _principal_coordinates(centred_NxF / scale)

    kernels_KxLxRxC, biases_KxLxC = _fit_in_coordinates(
        coordinates_NxR, train, l2_L, num_classes, iterations
    )
    kernels_KxLxFxC = jnp.einsum("fr,klrc->klfc", rotation_FxR, kernels_KxLxRxC) / scale
    biases_KxLxC -= jnp.einsum("f,klfc->klc", mean_F, kernels_KxLxFxC)
    return kernels_KxLxFxC, biases_KxLxC


def linear_probe_correct(
    train: LabelledFeatures,
    validation: LabelledFeatures,
    test: LabelledFeatures,
    l2_L: jax.Array,
    *,
    shots: int,
    num_classes: int,
    iterations: int,
) -> jax.Array:
    """Return correct_KxN, whether each probe predicts each test sentence's label.

    Each probe is fitted on the first `shots` training sentences. Its penalty is the one with the
    highest accuracy on the validation sentences, or the larger of two equal ones. Test labels have
    no effect on the fit.
    """
    first = jax.tree.map(lambda x: x[..., :shots], (train.labels_KxN, train.valid_KxN))
    kernels_KxLxFxC, biases_KxLxC = fit_linear_probes(
        LabelledFeatures(train.features_NxF[:shots], *first),
        l2_L,
        num_classes=num_classes,
        iterations=iterations,
    )
    hits_KxLxN = _predictions(validation, kernels_KxLxFxC, biases_KxLxC)
    hits_KxLxN = (hits_KxLxN == validation.labels_KxN[:, None]) & validation.valid_KxN[:, None]
    last_first_KxL = hits_KxLxN.sum(-1)[:, ::-1]
    best_K = len(l2_L) - 1 - jnp.argmax(last_first_KxL, axis=1)
    rows_K = jnp.arange(len(best_K))
    kernels_Kx1xFxC = kernels_KxLxFxC[rows_K, best_K][:, None]
    biases_Kx1xC = biases_KxLxC[rows_K, best_K][:, None]
    return _predictions(test, kernels_Kx1xFxC, biases_Kx1xC)[:, 0] == test.labels_KxN


def _predictions(
    data: LabelledFeatures, kernels_KxLxFxC: jax.Array, biases_KxLxC: jax.Array
) -> jax.Array:
    logits_KxLxNxC = jnp.einsum("nf,klfc->klnc", data.features_NxF, kernels_KxLxFxC)
    return jnp.argmax(logits_KxLxNxC + biases_KxLxC[:, :, None], axis=-1)


def _principal_coordinates(centred_NxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (coordinates_NxR, rotation_FxR), R = min(N, F): X = coordinates @ rotation.T."""
    num_examples, num_features = centred_NxF.shape
    if num_features <= num_examples:
        _, rotation_FxF = jnp.linalg.eigh(centred_NxF.T @ centred_NxF)
        return centred_NxF @ rotation_FxF, rotation_FxF
    squares_N, left_NxN = jnp.linalg.eigh(centred_NxF @ centred_NxF.T)
    positive_N = squares_N > squares_N[-1] * num_examples * jnp.finfo(squares_N.dtype).eps
    roots_N = jnp.where(positive_N, jnp.sqrt(jnp.where(positive_N, squares_N, 1)), jnp.inf)
    rotation_FxN = centred_NxF.T @ (left_NxN / roots_N[None, :])
    return centred_NxF @ rotation_FxN, rotation_FxN


def _fit_in_coordinates(
    coordinates_NxR: jax.Array,
    train: LabelledFeatures,
    l2_L: jax.Array,
    num_classes: int,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """Fit in principal coordinates (orthogonal columns); see `fit_linear_probes`.

    All fits share one matrix product: J = K * L * C columns.
    """
    dtype, num_coordinates = coordinates_NxR.dtype, coordinates_NxR.shape[1]
    shape_KxLxC = (len(train.labels_KxN), len(l2_L), num_classes)
    valid_NxK = train.valid_KxN.T.astype(dtype)
    weights_NxK = valid_NxK / jnp.maximum(valid_NxK.sum(0, keepdims=True), 1)
    weights_NxKx1x1 = weights_NxK[:, :, None, None]
    targets_NxKx1xC = jax.nn.one_hot(train.labels_KxN.T, num_classes, dtype=dtype)[:, :, None]

    def columns(x_KxL: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x_KxL[:, :, None], shape_KxLxC).reshape(1, -1)

    # Curvature bounds; sum_n w_n z_n z_n' <= max_n w_n * sum_n z_n z_n', which is diagonal.
    bounds_1xJ = columns(jnp.broadcast_to(0.5 * weights_NxK.max(0)[:, None], shape_KxLxC[:2]))
    l2_1xJ = columns(jnp.broadcast_to(l2_L[None, :], shape_KxLxC[:2]))
    squares_Rx1 = (coordinates_NxR**2).sum(0)[:, None]
    steps = (1 / (bounds_1xJ * squares_Rx1 + l2_1xJ), jnp.asarray(2, dtype))

    def gradient(kernel_RxJ: jax.Array, bias_1xJ: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_NxJ = coordinates_NxR @ kernel_RxJ + bias_1xJ
        probs_NxKxLxC = jax.nn.softmax(logits_NxJ.reshape(-1, *shape_KxLxC))
        residuals_NxJ = ((probs_NxKxLxC - targets_NxKx1xC) * weights_NxKx1x1).reshape(
            logits_NxJ.shape
        )
        slope_RxJ = coordinates_NxR.T @ residuals_NxJ + l2_1xJ * kernel_RxJ
        return slope_RxJ, residuals_NxJ.sum(0, keepdims=True)

    def body(_: jax.Array, carry: Any) -> Any:
        probe, ahead, age_1xJ = carry
        slope = gradient(*ahead)
        new = jax.tree.map(lambda x, step, g: x - step * g, ahead, steps, slope)
        moved = jax.tree.map(jnp.subtract, new, probe)
        progress_J = (slope[0] * moved[0]).sum(0) + (slope[1] * moved[1]).sum(0)
        uphill_KxL = progress_J.reshape(shape_KxLxC).sum(-1) > 0
        age_1xJ = jnp.where(columns(uphill_KxL), 0, age_1xJ + 1)
        momentum_1xJ = age_1xJ / (age_1xJ + 3)
        return new, jax.tree.map(lambda x, m: x + momentum_1xJ * m, new, moved), age_1xJ

    zero = (
        jnp.zeros((num_coordinates, bounds_1xJ.size), dtype),
        jnp.zeros((1, bounds_1xJ.size), dtype),
    )
    start = (zero, zero, jnp.zeros_like(bounds_1xJ))
    (kernel_RxJ, bias_1xJ), _, _ = jax.lax.fori_loop(0, iterations, body, start)
    kernel_RxKxLxC = kernel_RxJ.reshape(num_coordinates, *shape_KxLxC)
    return jnp.moveaxis(kernel_RxKxLxC, 0, 2), bias_1xJ.reshape(shape_KxLxC)
