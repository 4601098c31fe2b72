"""Collectives among ranks, and a count of the bytes they send."""
