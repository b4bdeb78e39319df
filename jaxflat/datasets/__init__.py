"""Data sets on disk, read in batches by number."""
