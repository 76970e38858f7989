"""What serves the ops: registration and choice of kernels, arithmetic, autocast, checks."""
