"""Checkpoints: their format, the state in them by parameter name, and what a restore did."""
