"""The training loop and what it calls: evaluation, saving, resuming, callbacks."""
