"""Masked pretraining of convolutional networks on visible blocks, and their classifiers."""
