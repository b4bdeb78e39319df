"""Many runs: list the runs of a sweep, share them among workers, and collect their results."""
