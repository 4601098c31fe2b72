"""distrain: one PyTorch model, trained under any parallelism with one word changed."""

__version__ = "0.1.0"
