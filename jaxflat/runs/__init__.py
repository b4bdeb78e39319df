"""One run: build the model from its config, train it, and measure its checkpoints."""

from jaxflat.runs.saved_run import SavedModel, load

__all__ = ["SavedModel", "load"]
