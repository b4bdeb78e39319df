"""Compute v' H v for many v, each at about the cost of a gradient: the second-order adjoint method.

`equations` classifies the equations of a jaxpr, `program` walks through them, and `adjoint` holds
the method.
"""

from jaxflat.flatness.second_order.adjoint import shared_hessian_form

__all__ = ["shared_hessian_form"]
