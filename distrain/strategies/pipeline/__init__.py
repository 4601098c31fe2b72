"""Pipeline parallelism."""

from distrain.strategies.pipeline import strategy as strategy
