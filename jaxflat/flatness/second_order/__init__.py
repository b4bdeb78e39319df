"""The second-order adjoint method: v' H v for many v at about the price of a gradient each.

`equations` classifies the equations of a jaxpr, `program` walks through them, and `adjoint` holds
the method.
"""

from jaxflat.flatness.second_order.adjoint import shared_hessian_form

__all__ = ["shared_hessian_form"]
