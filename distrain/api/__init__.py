"""The Python API, for scripts and notebooks: what the commands do, with objects."""
