"""Read a sweep's files; write its figures, its page and its summary. Draw measured checkpoints."""
