"""A model over HTTP: requests in, batches through the model, answers out."""
