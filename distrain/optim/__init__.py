"""Optimizers, learning-rate schedules and losses."""
