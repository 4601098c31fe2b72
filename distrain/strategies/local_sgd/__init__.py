"""Ranks that train copies of their own and merge them every few steps."""

from distrain.strategies.local_sgd import strategy as strategy
