"""Collectives among ranks, and the bytes they send."""
