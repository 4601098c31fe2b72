"""Writing files safely, and reading files that come from an untrusted source."""
