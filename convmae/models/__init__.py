"""The models: ConvMAE and FastConvMAE for pretraining, ConvViT for classification, by name."""

from convmae.models.convmae import ConvMAE, ConvMAEOutput, Reconstruction
from convmae.models.convvit import ConvViT
from convmae.models.dense import DenseConvMAE
from convmae.models.fastconvmae import FastConvMAE
from convmae.models.layers import resample_pos_embed
from convmae.models.registry import create_model, full_name, list_models

__all__ = [
    "ConvMAE",
    "ConvMAEOutput",
    "ConvViT",
    "DenseConvMAE",
    "FastConvMAE",
    "Reconstruction",
    "create_model",
    "full_name",
    "list_models",
    "resample_pos_embed",
]
