"""What the network, its steps and its data cost: one verb of `tools/benchmark.py` a file."""
