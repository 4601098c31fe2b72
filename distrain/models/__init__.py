"""Models as sequences of blocks; see :mod:`distrain.models.base`."""

from distrain.models.base import BlockSequence, FromData, build, check

__all__ = ["BlockSequence", "FromData", "build", "check"]
