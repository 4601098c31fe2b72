"""Compact encodings of numbers as bytes: small integers, positions, several tensors in one message."""
