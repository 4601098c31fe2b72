"""Commands: Hydra's command line, and one file a command."""
