"""Measure how flat a JAX loss is around given parameters, any pytree of arrays."""

from jaxflat.flatness.diagonal import fisher_diagonal, hessian_diagonal
from jaxflat.flatness.estimate import Estimate, ratio_estimate
from jaxflat.flatness.gradient_noise import GradientNoise, gradient_noise
from jaxflat.flatness.inputs import from_mean_loss
from jaxflat.flatness.landscape import filter_normalized, loss_barrier, loss_rises
from jaxflat.flatness.learning_coefficient import (
    LearningCoefficient,
    effective_sample_size,
    local_learning_coefficient,
    split_r_hat,
)
from jaxflat.flatness.measures import MEASURES, Measured, Problem
from jaxflat.flatness.products import (
    curvature_along,
    fisher_vector_product,
    gauss_newton_quadratic_form,
    gauss_newton_vector_product,
    hessian_quadratic_form,
    hessian_vector_product,
    mean_gradient,
)
from jaxflat.flatness.sharpness import (
    average_sharpness,
    critical_sharpness,
    mean_loss,
    worst_sharpness,
)
from jaxflat.flatness.spectrum import (
    SpectralDensity,
    gauss_newton_extremes,
    hessian_density,
    hessian_extremes,
)
from jaxflat.flatness.terms import TraceTerms, sample_until
from jaxflat.flatness.trace import (
    fisher_trace,
    fisher_trace_terms,
    gauss_newton_trace,
    gauss_newton_trace_samples,
    hessian_trace,
    hessian_trace_samples,
    hessian_trace_terms,
)

__all__ = [
    "MEASURES",
    "Estimate",
    "GradientNoise",
    "LearningCoefficient",
    "Measured",
    "Problem",
    "SpectralDensity",
    "TraceTerms",
    "average_sharpness",
    "critical_sharpness",
    "curvature_along",
    "effective_sample_size",
    "filter_normalized",
    "fisher_diagonal",
    "fisher_trace",
    "fisher_trace_terms",
    "fisher_vector_product",
    "from_mean_loss",
    "gauss_newton_extremes",
    "gauss_newton_quadratic_form",
    "gauss_newton_trace",
    "gauss_newton_trace_samples",
    "gauss_newton_vector_product",
    "gradient_noise",
    "hessian_density",
    "hessian_diagonal",
    "hessian_extremes",
    "hessian_quadratic_form",
    "hessian_trace",
    "hessian_trace_samples",
    "hessian_trace_terms",
    "hessian_vector_product",
    "local_learning_coefficient",
    "loss_barrier",
    "loss_rises",
    "mean_gradient",
    "mean_loss",
    "ratio_estimate",
    "sample_until",
    "split_r_hat",
    "worst_sharpness",
]
