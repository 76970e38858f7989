"""`convmae embed`: features of pictures."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convmae.commands.inference import Job, Loaded, mark_not_finite, output_of, report, run
from convmae.config import OptionError
from convmae.models import ConvViT, create_model
from convmae.models.cnn.classifier import TimmClassifier
from convmae.records.parts import Parts
from convmae.records.row_files import (
    legible,
    new_text,
    regrouped,
    write_csv,
    write_npy,
    write_npz,
    write_parquet,
)
from convmae_kernels import BlockMask, scatter_visible

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from convmae.commands.inference import RowsSummary
    from convmae.config import EmbedConfig
    from convmae.models import ConvMAE
    from convmae.records.parts import Rows

FEATURES = "features"
TEXTS = ("name", "label", "error")


def embed(config: EmbedConfig) -> RowsSummary:
    """Computes features of pictures with any model, and writes them with their names.

    - `.npz`: arrays `features` `[N, D]` or `[N, D, h, w]`, `name`, `label` (the true class, where
      the pictures have some) and `error` (why there are none), for `numpy.load`.
    - `.npy`: the features alone, for `numpy.load(..., mmap_mode="r")`; the rest beside them, in a
      `.csv` of that name.
    - `.parquet`: the same columns; a map is one flat list, its shape in the file's metadata.

    Returns:
        Counts and speed.

    Raises:
        OptionError (a ValueError): an option cannot work.
        convmae.data.DataError (a ValueError): no such pictures.
        convmae.records.parts.WriteError: the disk refused; what was stored before is kept.
        KeyboardInterrupt: Ctrl-C; what was computed is stored.
    """
    return run(config, lambda loaded: _Embedding(config, loaded))


class _Embedding(Job):
    """Features of one stage, pooled or as maps."""

    classes = None

    def __init__(self, config: EmbedConfig, loaded: Loaded) -> None:
        self.config, self.model = config, loaded.model
        check_features(self.model, config)
        output = output_of(config)
        if config.table_format != "npy" or output is None:
            return
        names = output.with_suffix(".csv")
        if names == output:
            raise OptionError(
                f"--output {config.output!r} is the name that the .csv of names beside it has; "
                "expected one that ends in .npy"
            )
        goes_on = Parts.folder_of(output).is_dir()
        if names.exists() and not config.overwrite and not goes_on:
            raise OptionError(
                f"--output {config.output!r}: {names}, where the names go, exists; --overwrite "
                "replaces it"
            )

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        return {FEATURES: features(self.model, images, self.config).float()}

    def finish(self, columns: dict[str, np.ndarray], reasons: list[str]) -> dict[str, np.ndarray]:
        values = columns[FEATURES]
        mark_not_finite(values, reasons)
        values[[bool(reason) for reason in reasons]] = np.nan
        if self.config.dtype == "float16":
            largest = float(np.nanmax(np.abs(values), initial=0.0))
            limit = float(np.finfo(np.float16).max)
            if largest > limit:
                raise OptionError(
                    f"--dtype float16 holds no more than {limit:g}, but a "
                    f"feature is {largest:g}; use float32"
                )
        return {FEATURES: values.astype(self.config.dtype)}

    # -- the file ---------------------------------------------------------------------------------

    def _texts(self, rows: Rows) -> dict[str, list[str]]:
        true = self.true_classes
        texts = {"name": [legible(name) for name in rows.names]}
        if true is not None:
            texts["label"] = [true[label] if label >= 0 else "" for label in rows.labels.tolist()]
        return texts | {"error": [legible(reason) for reason in rows.reasons]}

    def _text(self, name: str, rows: Rows) -> list[str]:
        return self._texts(rows)[name]

    def _columns(self) -> list[str]:
        return [name for name in TEXTS if name != "label" or self.true_classes is not None]

    def write(self, parts: Parts, output: Path | None) -> None:
        assert output is not None
        kind = self.config.table_format
        if kind == "parquet":
            write_parquet(map(self._arrow_table, regrouped(parts.read())), output)
        elif kind == "npz":
            texts = {name: partial(self._text, name) for name in self._columns()}
            write_npz(parts, FEATURES, texts, output)
        else:
            with new_text(output.with_suffix(".csv")) as opened:
                write_csv(self._records(parts), self._columns(), opened)
            write_npy(parts, FEATURES, output)

    def _records(self, parts: Parts) -> Iterator[dict[str, Any]]:
        for rows in parts.read(columns=False):
            texts = self._texts(rows)
            for values in zip(*texts.values()):
                yield dict(zip(texts, values))

    def _arrow_table(self, rows: Rows) -> Any:
        import pyarrow as arrow

        values = rows.columns[FEATURES]
        flat = arrow.array(values.reshape(-1))
        width = int(np.prod(values.shape[1:]))
        columns: dict[str, Any] = {k: arrow.array(v) for k, v in self._texts(rows).items()}
        columns[FEATURES] = arrow.FixedSizeListArray.from_arrays(flat, width)
        return arrow.table(columns).replace_schema_metadata({"shape": str(list(values.shape[1:]))})


def check_features(model: Any, config: EmbedConfig) -> None:
    """Raises `OptionError` where a model has no such features."""
    if isinstance(model, TimmClassifier):
        if config.pool == "token":
            raise OptionError(
                f"--pool token: {model.name} of --checkpoint {config.checkpoint!r} has no tokens; "
                "use --pool mean or auto"
            )
        if config.stage is not None:
            with torch.device("meta"):
                blank: Any = create_model(model.name, **model.config).eval()
                _network_map(blank, torch.empty(1, model.in_chans, *model.img_size), config.stage)
    elif config.stage == 4:
        raise OptionError(
            f"--stage 4, of stride 32, is of networks of timm; the {type(model).__name__} of "
            f"--checkpoint {config.checkpoint!r} has 1, 2 and 3"
        )


def features(model: Any, images: Tensor, config: EmbedConfig) -> Tensor:
    """Features of normalised images `[N, C, H, W]`: `[N, D]`, or maps `[N, D, h, w]`.

    Those of the last stage are `forward_features` of a classifier, and `forward_encoder` of a
    pretrained ConvMAE that sees every patch.
    """
    if isinstance(model, TimmClassifier):
        return _features_of_network(model, images, config)
    if config.stage in (1, 2):
        maps = _stage_map(model, images, config.stage)
        return maps if config.features == "map" else _at_least_float32(maps).mean((2, 3))
    if isinstance(model, ConvViT):
        tokens = model.forward_features(images)  # [N, L, D]
    else:
        mask = BlockMask.full(images.shape[0], model.grid, images.device)
        tokens = model.forward_encoder(images, mask)
    if config.features == "map":
        return tokens.transpose(1, 2).unflatten(2, model.grid)
    if config.pool == "token":
        return tokens[:, 0]
    if config.pool == "auto" and isinstance(model, ConvViT) and model.global_pool != "":
        return model.forward_head(tokens, pre_logits=True)
    return _at_least_float32(tokens).mean(1)


def _features_of_network(model: Any, images: Tensor, config: EmbedConfig) -> Tensor:
    """`features` of one of timm's networks."""
    if config.stage is not None:
        maps = _network_map(model, images, config.stage)
    else:
        maps = model.forward_features(images)
        if config.features == "pooled" and config.pool == "auto":
            return model.forward_head(maps, pre_logits=True)
    return maps if config.features == "map" else _at_least_float32(maps).mean((2, 3))


def _network_map(model: TimmClassifier, images: Tensor, stage: int) -> Tensor:
    """The last map of a stage of one of timm's networks, `[N, D, h, w]`.

    Raises:
        OptionError: it has no map of that stride.
    """
    stride = 2 ** (stage + 1)
    sizes = [-(-side // stride) for side in images.shape[2:]]
    try:
        maps = [found for found in model.stage_maps(images) if list(found.shape[2:]) == sizes]
    except ValueError as error:
        raise OptionError(f"--stage {stage}: {error}; leave it out for the last map") from error
    if not maps:
        raise OptionError(
            f"--stage {stage}: {model.name} has no map of stride {stride}, {sizes[0]} x {sizes[1]} "
            f"of {images.shape[2]} x {images.shape[3]} pixels; leave it out for the last map"
        )
    return maps[-1]


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _stage_map(model: ConvMAE | ConvViT, images: Tensor, stage: int) -> Tensor:
    """The output of stage 1 or 2, `[N, D, h, w]`."""
    mask = BlockMask.full(images.shape[0], model.grid, images.device)
    model.check_images(images)
    x = model.stage1(images, mask)
    if stage == 2:
        x = model.stage2(x, mask)
    return scatter_visible(x, mask)


def main(config: EmbedConfig) -> int:
    """The command: `embed`, and what it says of itself; returns the exit status."""
    return report(embed(config))
