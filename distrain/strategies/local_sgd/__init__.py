"""Local SGD and DiLoCo: ranks train by themselves and merge their parameters from time to time."""

from distrain.strategies.local_sgd import strategy as strategy
