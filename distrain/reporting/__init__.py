"""Metrics, the loggers that write them, and figures."""
