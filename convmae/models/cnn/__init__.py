"""Masked pretraining of convolutional networks: SparK and FCMAE on any of them."""

from convmae.models.cnn.fcmae import FCMAE
from convmae.models.cnn.masked_cnn import MaskedCNN
from convmae.models.cnn.spark import SparK

__all__ = ["FCMAE", "MaskedCNN", "SparK"]
