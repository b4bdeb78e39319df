"""Reads a sweep's files; writes its figures, its page and its summary."""
