"""Pipeline parallelism: each rank holds some layers, and batches pass through the ranks in microbatches."""

from distrain.strategies.pipeline import strategy as strategy
