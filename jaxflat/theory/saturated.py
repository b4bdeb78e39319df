"""Questions with known true answers, a model of them, and the exact matrices of its loss.

All arrays are float64 under `jax.enable_x64(True)`. Parameters are one vector.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class SaturatedProblem:
    """Question c has probability weights_C, and its answer v has probability probs_CxV.

    logits_fn(params_P) -> CxV is the model; the loss is its mean cross-entropy, in nats.
    """

    logits_fn: Callable[[Array], Array]
    weights_C: Array
    probs_CxV: Array

    @property
    def joint_CxV(self) -> Array:
        """The joint probability of a question and its answer."""
        return self.weights_C[:, None] * self.probs_CxV

    def log_probs(self, params_P: Array) -> Array:
        """Return log p(v | c) of the model, CxV, in nats."""
        return jax.nn.log_softmax(self.logits_fn(params_P))

    def loss(self, params_P: Array) -> Array:
        """Return the population loss, in nats."""
        return -jnp.sum(self.joint_CxV * self.log_probs(params_P))

    def excess_loss(self, params_P: Array) -> Array:
        """Return E[KL(p* || model)] in nats; log(model / p*) avoids cancellation near 0."""
        ratios_CxV = self.log_probs(params_P) - jnp.log(self.probs_CxV)
        return jnp.sum(self.joint_CxV * (jnp.expm1(ratios_CxV) - ratios_CxV))

    def scores(self, params_P: Array) -> Array:
        """Return the gradient of every log p(v | c), CxVxP."""
        return jax.jacrev(self.log_probs)(params_P)

    def hessian(self, params_P: Array) -> Array:
        """Return the Hessian of the population loss, PxP."""
        return jax.hessian(self.loss)(params_P)

    def gradient_covariance(self, params_P: Array) -> Array:
        """Return Sigma = E[s s'] - E[s] E[s]', PxP, over all questions and true answers."""
        scores_NxP = self.scores(params_P).reshape(-1, params_P.size)
        joint_N = self.joint_CxV.reshape(-1)
        mean_P = joint_N @ scores_NxP
        return scores_NxP.T @ (joint_N[:, None] * scores_NxP) - jnp.outer(mean_P, mean_P)

    def gauss_newton(self, params_P: Array) -> Array:
        """Return G = E[s s'] with answers from the model, PxP."""
        probs_CxV = jnp.exp(self.log_probs(params_P))
        joint_N = (self.weights_C[:, None] * probs_CxV).reshape(-1)
        scores_NxP = self.scores(params_P).reshape(-1, params_P.size)
        return scores_NxP.T @ (joint_N[:, None] * scores_NxP)

    def trace(self, params_P: Array) -> Array:
        """Return E|s|^2 over questions and true answers: tr H and tr Sigma at saturation."""
        return jnp.sum(self.joint_CxV[..., None] * self.scores(params_P) ** 2)
