"""Augmentation of training images: whole batches by a few tensor operations, or image by image in worker processes."""
