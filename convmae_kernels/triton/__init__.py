"""Triton kernels and their launchers, one module per op; imported when one is first called."""
