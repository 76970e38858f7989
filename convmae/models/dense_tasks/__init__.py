"""Models for dense tasks: backbones of several scales, a segmenter, a detector."""
