"""Parameter servers."""

from distrain.strategies.parameter_server import strategy as strategy
