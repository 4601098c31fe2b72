"""Models as sequences of blocks, and how the configured one is built."""
