"""Finds out what keeps the ranks of a job from working together, even where no process group can form."""
