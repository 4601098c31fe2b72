"""Models as sequences of blocks; see :mod:`distrain.models.base`."""

from distrain.models.base import BlockSequence, build, check

__all__ = ["BlockSequence", "build", "check"]
