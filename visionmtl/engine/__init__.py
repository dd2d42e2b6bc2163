"""Training and evaluation loops, checkpoints, and processes."""
