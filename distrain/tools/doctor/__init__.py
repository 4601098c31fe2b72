"""Finds out why the ranks of a job cannot work together, even where no process group can form."""
