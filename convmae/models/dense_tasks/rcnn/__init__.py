"""The parts of Mask R-CNN on torchvision's; a module here is imported where there is torchvision.

What differs from torchvision is what differs in the published detectors: anchors that are not
rounded, aligned pooling, L1 losses and their divisors, the background as the last class, masks
that are pasted without enlarging their boxes.
"""
