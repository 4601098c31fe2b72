"""Data sets, the order of samples, whole-batch augmentation, and the loader that makes batches of them."""
