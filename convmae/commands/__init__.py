"""What does not train: evaluate, reconstruct, convert, stats, info."""
