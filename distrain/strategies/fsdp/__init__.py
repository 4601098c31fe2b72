"""strategy=fsdp: every rank keeps only its part of the optimizer's state, of the gradients, and of the parameters."""

from distrain.strategies.fsdp import strategy as strategy
