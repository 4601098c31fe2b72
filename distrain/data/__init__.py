"""Data sets, the order of samples, augmentation, and the loader that makes batches."""
