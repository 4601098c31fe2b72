"""Whether a training on many ranks is the training of one process: short runs of both, compared number by number."""
