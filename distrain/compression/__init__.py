"""Gradient compression, independent of the strategy; one file per compressor."""
