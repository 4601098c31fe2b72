"""Predicts what a step of a training costs under each strategy, on measured or described machines."""
