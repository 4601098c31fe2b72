"""What a rank runs in: process group, device, rendezvous, signals, agreement among ranks, memory."""
