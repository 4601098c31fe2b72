"""Loggers: where metrics are written. A file for each choice of ``logger``."""

from distrain.reporting.loggers import base as base
