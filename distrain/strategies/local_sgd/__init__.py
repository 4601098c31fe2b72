"""Ranks that train by themselves and merge their parameters now and then."""

from distrain.strategies.local_sgd.strategy import LocalSGD as LocalSGD
from distrain.strategies.local_sgd.strategy import LocalSGDConfig as LocalSGDConfig
