"""The models: ConvMAE, FastConvMAE, SparK, FCMAE for pretraining, ConvViT to classify, by name."""

from convmae.models.cnn import FCMAE, SparK
from convmae.models.convmae import ConvMAE
from convmae.models.convvit import ConvViT
from convmae.models.dense import DenseConvMAE
from convmae.models.fastconvmae import FastConvMAE
from convmae.models.image_model import ConvMAEOutput, MaskedImageModel, Reconstruction
from convmae.models.layers import resample_pos_embed
from convmae.models.registry import create_model, full_name, list_models

__all__ = [
    "ConvMAE",
    "ConvMAEOutput",
    "ConvViT",
    "DenseConvMAE",
    "FCMAE",
    "FastConvMAE",
    "MaskedImageModel",
    "Reconstruction",
    "SparK",
    "create_model",
    "full_name",
    "list_models",
    "resample_pos_embed",
]
