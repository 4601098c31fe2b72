"""What updates parameters: optimizers, learning-rate schedules and losses."""
