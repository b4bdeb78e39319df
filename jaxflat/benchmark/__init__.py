"""What this machine can do, and how much of it training and flatness get out of it."""
