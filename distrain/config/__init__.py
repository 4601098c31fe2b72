"""Typed configuration: schemas, the registry of choices, loading and checking."""
