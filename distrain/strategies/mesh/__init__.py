"""strategy=mesh: replicas, shards, stages and divided layers, in any product that gives the number of ranks."""

from distrain.strategies.mesh import strategy as strategy
