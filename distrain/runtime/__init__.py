"""A rank's surroundings: process group, device, rendezvous, signals, agreement among ranks, memory."""
