"""One run: from a resolved config to its objects, its training, and each of its measurements."""
