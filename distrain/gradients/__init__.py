"""Gradients: buckets, their sizes, the exchange during the backward pass, clipping."""
