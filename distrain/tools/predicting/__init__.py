"""Predictions for many images: the images, the parts that are finished, and the files of the result."""
