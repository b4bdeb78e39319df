"""Files that are written whole, and checkpoints that are verified when read."""
