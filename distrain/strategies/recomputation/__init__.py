"""Activation checkpointing: blocks of the model that are computed again in the backward pass instead of being kept."""
