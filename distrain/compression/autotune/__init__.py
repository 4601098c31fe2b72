"""Which compressor pays on this network: measuring, a cost model, and the choice."""
