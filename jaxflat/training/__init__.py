"""Train on batches of arrays: losses, optimizers, and one step or many in a compiled call."""
