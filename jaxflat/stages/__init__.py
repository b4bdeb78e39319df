"""The stages of a run: train, evaluate, flatness, probe. They meet on disk."""
