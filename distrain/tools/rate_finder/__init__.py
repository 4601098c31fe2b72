"""Finds a learning rate: a short training whose rate rises in every step."""
