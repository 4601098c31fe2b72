"""A model in stages on different ranks: orders of work, the split, and the stages themselves."""
