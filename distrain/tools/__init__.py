"""Tools around a training: doctor, chaos, test networks, launching."""
