"""Many runs: list the runs of a sweep, share them among workers, and collect their results."""

from jaxflat.sweeps.data_frame import read_results

__all__ = ["read_results"]
