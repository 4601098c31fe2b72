"""Injects faults into trainings, lets them resume, and compares the results with undisturbed runs."""
