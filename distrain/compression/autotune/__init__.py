"""Measures and predicts which compressor makes training steps fastest on this network."""
