"""A step of each strategy as programs of its ranks; one file a strategy."""
