"""What a model is trained to do: the loss, the metrics, and what its outputs mean."""
