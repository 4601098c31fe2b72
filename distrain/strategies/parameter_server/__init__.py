"""``strategy=parameter_server``: servers hold the parameters, workers push gradients and pull parameters."""

from distrain.strategies.parameter_server import strategy as strategy
