"""ConvViT, the classifier that a pretrained ConvMAE becomes."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.layers import TOKEN_EPS, LayerNorm, Linear, add_parameter, resample_pos_embed
from convmae.models.trunk import Trunk, check_img_size

if TYPE_CHECKING:
    from collections.abc import Sequence

POOLS: dict[bool | str, bool | str] = {
    True: True,
    "avg": True,
    False: False,
    "token": False,
    "": "",
}
NUM_FEATURES = 4  # of strides 4, 8, 16, 32


class ConvViT(Trunk):
    """`head(fc_norm(mean(blocks3(tokens + pos_embed))))`: ConvMAE's encoder on whole images.

    The outputs of stages 1 and 2 are not added to those of stage 3 here, as in the official code.
    It has the methods that timm's models have: dense features, layer groups, other classifiers.

    Args:
        img_size: height and width of the images, one number for squares; multiples of 16.
        in_chans: channels of the images.
        num_classes: width of the output; 0 for the features themselves (`head` does nothing).
        embed_dim: channels of the three stages.
        depth: blocks of the three stages.
        num_heads: attention heads of stage 3.
        mlp_ratio: hidden / outer channels of the MLPs of the three stages.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        global_pool: True or `"avg"` classifies the mean of all tokens, after which comes `fc_norm`.
            Otherwise `norm` comes first: False or `"token"` classifies the top-left token, as in
            the official code; `""` classifies every token.
        head_norm: a BatchNorm without parameters before the linear layer of the head, as linear
            probes have; they are then `head.0` and `head.1`.
        dynamic_img_size: take images of any size that 16 divides; the position embedding is then
            resampled from `img_size` to that of the images in every pass.

    Attributes:
        config: the arguments as plain values; `ConvViT(**model.config)` is the same architecture.
        img_size: `(height, width)`.
        grid: `(gh, gw)`, the patches of a column and a row.
        patch_size: 16.
        num_classes: as given, or as `reset_classifier` set it.
        embed_dim, num_features, head_hidden_size: the width `D` of the tokens; all the same.
        feature_info: channels (`num_chs`), stride (`reduction`) and module of each of the maps of
            `forward_intermediates`.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (256, 384, 768),
        depth: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        drop_path_rate: float = 0.0,
        global_pool: bool | str = True,
        head_norm: bool = False,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__(img_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        self.num_classes = _check_num_classes(num_classes)
        self.global_pool = _check_pool(global_pool)
        self.head_norm = head_norm
        if head_norm and self.global_pool == "":
            raise ValueError('head_norm is for pooled features, but global_pool is ""')
        self.last_stage = 2
        self.config: dict[str, Any] = {
            "img_size": list(self.img_size),
            "in_chans": in_chans,
            "num_classes": num_classes,
            "embed_dim": list(embed_dim),
            "depth": list(depth),
            "num_heads": num_heads,
            "mlp_ratio": list(mlp_ratio),
            "drop_path_rate": drop_path_rate,
            "global_pool": self.global_pool,
            "head_norm": head_norm,
        }
        self.dynamic_img_size = dynamic_img_size
        if dynamic_img_size:  # so that files written before there was such an option stay equal
            self.config["dynamic_img_size"] = True
        dim = embed_dim[2]
        self.embed_dim = self.num_features = self.head_hidden_size = dim
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": module}
            for channels, stride, module in (
                (embed_dim[0], 4, "blocks1"),
                (embed_dim[1], 8, "blocks2"),
                (dim, 16, "blocks3"),
                (dim, 32, "blocks3"),  # pooled
            )
        ]
        if not self.global_pool:
            self.norm = LayerNorm(dim, eps=TOKEN_EPS)
        self.head = self._new_head()
        if self.global_pool:
            self.fc_norm = LayerNorm(dim, eps=TOKEN_EPS)
        self.reset_parameters()

    def _new_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        layer = Linear(self.embed_dim, self.num_classes)
        if not self.head_norm:
            return layer
        return nn.Sequential(nn.BatchNorm1d(self.embed_dim, eps=TOKEN_EPS, affine=False), layer)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers and the position embedding N(0, 0.02), biases 0, convolutions as built.

        Nothing is drawn on the meta device, which holds no numbers.
        """
        if self.pos_embed.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _reset_linear(module)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    # -- forward ----------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """`forward_head(forward_features(images))`.

        Args:
            images: floating `[N, in_chans, H, W]` of the model's `img_size`, normalised.

        Returns:
            Logits `[N, num_classes]`, or pooled features `[N, D]` if `num_classes` is 0; with
            `global_pool=""` those of each token, `[N, L, ...]`.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The tokens of all patches `[N, L, D]`, in raster order; normed unless they are averaged.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        _, _, x = self._stages(images, 2)
        return x if self.global_pool else self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`head(pool(x))`.

        Args:
            x: tokens `[N, L, D]` from `forward_features`.
            pre_logits: stop before `head`.
        """
        if self.global_pool:
            x = self.fc_norm(x.mean(dim=1))
        elif self.global_pool is False:
            x = x[:, 0]
        return x if pre_logits else self.head(x)

    def _stages(self, images: Tensor, last: int) -> list[Tensor]:
        """`whole_stages`, and the tokens behind the blocks of stage 3: up to stage `last`."""
        self.check_images(images)
        if last > self.last_stage:
            raise ValueError(
                f"stage {last + 1} is asked for, but prune_intermediate_layers left "
                f"{self.last_stage + 1} of 3 stages"
            )
        outputs = self.whole_stages(images, last)
        if last >= 2:
            grid = self._grid_of(images)
            x = add_parameter(outputs[2], resample_pos_embed(self.pos_embed, self.grid, grid))
            for block in self.blocks3:
                x = self.run_block(block, x)
            outputs[2] = x
        return outputs

    def check_size(self, height: int, width: int) -> None:
        """The images are of the model's size, or with `dynamic_img_size` of one that 16 divides.

        Raises:
            ValueError: they are not.
        """
        if not self.dynamic_img_size:
            super().check_size(height, width)
        elif height < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images are {height} x {width}, expected multiples of {self.patch_size} "
                "(dynamic_img_size)"
            )

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        """`(gh, gw)` patches of images that fit the model."""
        if not self.dynamic_img_size:
            return self.grid
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size

    # -- dense features ---------------------------------------------------------------------------

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of strides 4, 8, 16 and 32: of the three stages, and `max_pool2d(third, 2)`.

        A row or column that is left over in pooling makes one of its own (`ceil_mode`).

        Args:
            images: floating `[N, in_chans, H, W]` of the model's `img_size`, normalised.
            indices: which maps, in `[0, 4)` or negative from the end; a number for the last so
                many; None for all.
            norm: apply the model's last LayerNorm to the maps of strides 16 and 32.
            stop_early: with `intermediates_only`, compute no stage that is not asked for.
            output_fmt: `"NCHW"` (channels-last in memory), `"NHWC"` or `"NLC"`.
            intermediates_only: return the list of maps alone.

        Returns:
            The maps in the order of `indices`; with `forward_features(images)` before them, as a
            tuple, unless `intermediates_only`.

        Raises:
            TypeError, ValueError: the images do not fit the model, or an argument is not one of
                the above.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt must be NCHW, NHWC or NLC, got {output_fmt!r}")
        wanted = feature_indices(indices)
        needed = min(max(wanted), 2)
        if not intermediates_only:
            last = 2
        else:
            last = needed if stop_early else max(needed, self.last_stage)
        outputs = self._stages(images, last)
        grid = self._grid_of(images)
        last_norm = self.fc_norm if self.global_pool else self.norm
        maps = []
        for index in wanted:
            x = outputs[min(index, 2)]
            if index >= 2:
                x = (last_norm(x) if norm else x).unflatten(1, grid)
                x = x.permute(0, 3, 1, 2).clone()  # no view of tokens: it may be written into
            else:
                x = self.stage_map(x, images)
            if index == 3:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            maps.append(x)
        if output_fmt != "NCHW":
            maps = [x.permute(0, 2, 3, 1) for x in maps]
        if output_fmt == "NLC":
            maps = [x.flatten(1, 2) for x in maps]
        if intermediates_only:
            return maps
        return (outputs[2] if self.global_pool else self.norm(outputs[2])), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Delete what the maps of `forward_intermediates(images, indices)` do not need.

        Args:
            indices: the maps that are wanted, as there.
            prune_norm: delete the last LayerNorm.
            prune_head: delete the classifier.

        Returns:
            `indices` as a list of numbers in `[0, 4)`.
        """
        wanted = feature_indices(indices)
        self.last_stage = min(max(wanted), self.last_stage)
        unused = {0: ["patch_embed2", "blocks2"], 1: ["patch_embed3", "patch_embed4", "blocks3"]}
        for stage in range(self.last_stage, 2):
            for name in unused[stage]:
                setattr(self, name, nn.Identity())
        self.pos_embed.requires_grad_(self.last_stage == 2 and self.pos_embed.requires_grad)
        if prune_norm:
            setattr(self, "fc_norm" if self.global_pool else "norm", nn.Identity())
        if prune_head:
            self.reset_classifier(0)
        return wanted

    # -- other classifiers and sizes --------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """The last layer, `head`."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: bool | str | None = None) -> None:
        """A fresh `head`, and another way to pool.

        Args:
            num_classes: width of the output; 0 for the features themselves.
            global_pool: as in the constructor; None keeps it. A LayerNorm that the model did not
                have yet is fresh.

        Raises:
            ValueError: `num_classes` or `global_pool` is none of these.
        """
        self.num_classes = _check_num_classes(num_classes)
        if global_pool is not None:
            pool = _check_pool(global_pool)
            old, new = ("fc_norm" if p else "norm" for p in (self.global_pool, pool))
            if old != new:
                delattr(self, old)
                setattr(self, new, LayerNorm(self.embed_dim, eps=TOKEN_EPS).to(self.pos_embed))
            self.global_pool = pool
        self.head = self._new_head().to(self.pos_embed)
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                _reset_linear(module)
        self.config |= {"num_classes": num_classes, "global_pool": self.global_pool}

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Take images of another size from now on; `pos_embed` is resampled and a new parameter.

        Args:
            img_size: height and width, one number for squares; multiples of 16.

        Raises:
            ValueError: a size is not a positive multiple of 16.
        """
        old_grid, self.img_size = self.grid, check_img_size(img_size)
        if self.grid != old_grid:
            resampled = resample_pos_embed(self.pos_embed.detach(), old_grid, self.grid)
            self.pos_embed = nn.Parameter(resampled, self.pos_embed.requires_grad)
        self.config["img_size"] = list(self.img_size)

    # -- training ---------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimizer should not decay, besides one-dimensional ones."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for `timm.optim`.

        As in the official code, stages 1 and 2 and all patch embeddings are the first layer, then
        comes one for each block of stage 3, and what is behind them is the last.

        Args:
            coarse: one layer for each stage instead.
        """
        if coarse:
            return {"stem": r"^pos_embed|^patch_embed", "blocks": r"^blocks(\d+)"}
        stem = r"^pos_embed|^patch_embed|^blocks[12]\."
        return {"stem": stem, "blocks": r"^blocks3\.(\d+)"}


def _reset_linear(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)


def _check_num_classes(num_classes: int) -> int:
    if not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(f"num_classes must be 0 or a positive number, got {num_classes!r}")
    return num_classes


def _check_pool(global_pool: bool | str) -> bool | str:
    if not isinstance(global_pool, (bool, str)) or global_pool not in POOLS:
        raise ValueError(
            "global_pool must be True or 'avg', False or 'token', or '' for none, got "
            f"{global_pool!r}"
        )
    return POOLS[global_pool]


def feature_indices(indices: int | Sequence[int] | None, name: str = "indices") -> list[int]:
    """Map numbers in `[0, 4)`: of the last `indices` maps, of a list, or all.

    Raises:
        ValueError: a number is outside, or there is none; the message calls them `name`.
    """
    wanted: list[Any] = []
    if indices is None:
        wanted = list(range(NUM_FEATURES))
    elif isinstance(indices, int) and 0 < indices <= NUM_FEATURES:
        wanted = list(range(NUM_FEATURES - indices, NUM_FEATURES))
    elif isinstance(indices, Iterable) and all(isinstance(i, Integral) for i in indices):
        wanted = [int(i) + NUM_FEATURES if i < 0 else int(i) for i in indices]
    if not wanted or not all(0 <= i < NUM_FEATURES for i in wanted):
        raise ValueError(
            f"{name} must be some of 0 ... {NUM_FEATURES - 1} (strides 4, 8, 16, 32), or how many "
            f"of the last, got {indices!r}"
        )
    return wanted
