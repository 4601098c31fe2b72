"""How numbers become few bytes: bits, positions, packing."""
