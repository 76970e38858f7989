"""Weights and masks of SparK's golden files, made from names, shapes and a seed; needs numpy only.

Pictures are those of `fill.images`.
"""

import re
import zlib

import numpy as np

ENCODER = "sparse_encoder.sp_cnn."
SCALES = (  # the first that fits says (offset, factor) of the normal numbers
    (lambda name, shape: name.endswith("running_mean"), 0.0, 0.1),
    (lambda name, shape: "mask_tokens" in name, 0.0, 0.5),
    (lambda name, shape: name.endswith("gamma"), 0.5, 0.1),
    (lambda name, shape: name.endswith("bias"), 0.0, 0.1),
    (lambda name, shape: len(shape) == 1, 1.0, 0.1),
)


def recipe(name, shape, seed):
    """The float32 numbers of one tensor, by its name in SparK's files; a count is 0."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    numbers = state.standard_normal(tuple(shape))
    if name.endswith("running_var"):
        return np.exp(0.2 * numbers).astype(np.float32)
    for fits, offset, factor in SCALES:
        if fits(name, shape):
            return (offset + factor * numbers).astype(np.float32)
    return (numbers / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def official_name(name):
    """SparK's name of a tensor of ours, which differs for a ConvNeXt of timm."""
    if not name.startswith(ENCODER):
        return name
    own = name.removeprefix(ENCODER)
    own = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", own)
    own = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", own)
    own = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", own)
    for timm, official in (
        ("conv_dw", "dwconv"),
        ("mlp.fc1", "pwconv1"),
        ("mlp.fc2", "pwconv2"),
    ):
        own = own.replace(timm, official)
    return ENCODER + own


def visible(batch, side, mask_ratio, seed):
    """bool `[batch, side, side]`: the blocks of smallest noise, as many as `round` says."""
    noise = np.random.RandomState(2000 + seed).uniform(size=(batch, side * side))
    keep = round(side * side * (1 - mask_ratio))
    shown = np.zeros((batch, side * side), bool)
    np.put_along_axis(shown, noise.argsort(axis=1)[:, :keep], True, axis=1)
    return shown.reshape(batch, side, side)
