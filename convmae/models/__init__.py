"""The models: ConvMAE for pretraining, ConvViT for classification, and their registry."""

from convmae.models.convmae import ConvMAE, ConvMAEOutput, Reconstruction
from convmae.models.convvit import ConvViT
from convmae.models.dense import DenseConvMAE
from convmae.models.registry import create_model, list_models

__all__ = [
    "ConvMAE",
    "ConvMAEOutput",
    "ConvViT",
    "DenseConvMAE",
    "Reconstruction",
    "create_model",
    "list_models",
]
