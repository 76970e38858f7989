"""Models that say something of every position of a picture: detectors and segmenters."""

from convmae.models.dense_tasks.convvit_backbones import (
    DetectionConvViT,
    SegmentationConvViT,
    ViTDetConvViT,
)
from convmae.models.dense_tasks.creation import create_backbone
from convmae.models.dense_tasks.simple_pyramid import SimpleFeaturePyramid
from convmae.models.dense_tasks.timm_backbone import TimmBackbone

__all__ = [
    "DetectionConvViT",
    "SegmentationConvViT",
    "SimpleFeaturePyramid",
    "TimmBackbone",
    "ViTDetConvViT",
    "create_backbone",
]
