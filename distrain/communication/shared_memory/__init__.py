"""Collectives among ranks of one host through shared memory instead of the host's network stack."""
