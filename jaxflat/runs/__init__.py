"""One run: build the model from its config, train it, and measure its checkpoints."""
