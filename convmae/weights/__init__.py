"""Weights: checkpoints of a run, and files from elsewhere."""
