"""Many runs: the points of a sweep, its record on disk, its workers, and its results."""
