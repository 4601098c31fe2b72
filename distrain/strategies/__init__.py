"""Parallel strategies: one file each. A strategy owns the training step; the trainer knows none of them by name."""
