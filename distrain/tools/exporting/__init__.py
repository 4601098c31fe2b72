"""Writes a run's model for use without distrain: as a program, and as a folder for hubs of models."""
