"""Optimizers: torch's fused ones and our own, one file each; parameter groups and lookahead work with all."""
