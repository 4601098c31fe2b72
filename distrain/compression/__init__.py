"""Gradient compression: one file a compressor, orthogonal to the strategies."""
