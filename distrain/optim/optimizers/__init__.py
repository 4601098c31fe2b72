"""Optimizers, one file for each kind; parameter groups and lookahead, which work with all of them."""
