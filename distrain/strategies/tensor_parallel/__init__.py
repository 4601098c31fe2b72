"""strategy=tensor_parallel: layers divided among ranks, which all train on the same batches."""

from distrain.strategies.tensor_parallel import strategy as strategy
