"""How flat a loss is around given parameters; sees only functions and pytrees of arrays."""

from jaxflat.flatness.estimate import Estimate, ratio_estimate
from jaxflat.flatness.products import gauss_newton_quadratic_form, hessian_vector_product
from jaxflat.flatness.terms import TraceTerms
from jaxflat.flatness.trace import (
    fisher_trace,
    fisher_trace_terms,
    gauss_newton_trace,
    hessian_trace,
    hessian_trace_terms,
)

__all__ = [
    "Estimate",
    "TraceTerms",
    "fisher_trace",
    "fisher_trace_terms",
    "gauss_newton_quadratic_form",
    "gauss_newton_trace",
    "hessian_trace",
    "hessian_trace_terms",
    "hessian_vector_product",
    "ratio_estimate",
]
