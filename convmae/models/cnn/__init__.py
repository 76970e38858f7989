"""Convolutional networks of timm."""
