"""What others do at the same work, in the same run: cases of `python -m benchmarks --full`.

The published code of ConvMAE, FastConvMAE and SparK takes part where the user names a checkout
(`benchmarks.checkouts`), spconv where it is installed. A peer's parameters, pictures and masks are
those of the others, and its loss and gradients are compared with theirs before anything is timed: a
peer that computes something else is named with its error, and has no time.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

import convmae
import convmae_kernels as ck
from benchmarks import checkouts, models, networks, pretraining, work
from benchmarks.cases import Sizes, feature_map
from benchmarks.checkouts import CheckoutError
from benchmarks.limits import clock_for
from benchmarks.registry import CASES, Case
from benchmarks.runner import (
    TOLERANCE,
    Comparison,
    Contender,
    DisagreementError,
    check_agreement,
)
from convmae.models import FastConvMAE
from convmae.models.layers import add_parameter
from convmae.models.maps import conv_map, embed_map, flat_map, tokens_of_map

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.setting import Setting
    from convmae.models.layers import ConvBlock
    from convmae_kernels import BlockMask

    Forward = Callable[[Setting, Tensor, Tensor], Tensor]  # setting, images, noise -> loss
    Ways = dict[str, tuple[nn.Module, Forward]]

PREFIX = "peer/"
PEERS = ("official", "spconv")  # contenders that are other people's code
BATCH = 1  # images of a model, at most: it takes seconds
SPARK = "spark/resnet50"
SPCONV_CALLS = 20  # that must all be right before one is timed
SPCONV_CHANNELS = 64


@dataclass(frozen=True)
class Checkouts:
    """Folders of published code; None where the user has none.

    Attributes:
        convmae, fastconvmae, spark: checkouts of Alpha-VL/ConvMAE, Alpha-VL/FastConvMAE and
            keyu-tian/SparK.
    """

    convmae: str | None = None
    fastconvmae: str | None = None
    spark: str | None = None


def cases(setting: Setting, dtype: torch.dtype, known: Checkouts, quick: bool) -> list[Case]:
    """The cases of all peers, in one dtype; the quick ones are those of a single op."""
    own = replace(setting, batch_size=min(BATCH, setting.batch_size))
    threads = torch.get_num_threads()
    made = [_case("spconv/3x3/forward", spconv_layer, setting, dtype, threads)]
    if threads > 1 and setting.device.type == "cpu":
        made.append(_case("spconv/3x3/forward/1_thread", spconv_layer, setting, dtype, 1))
    if quick:
        return made
    passes: dict[str, Callable[..., Comparison]] = {
        "convmae": partial(convmae_pass, folder=known.convmae),
        "fastconvmae": partial(fastconvmae_pass, folder=known.fastconvmae),
    }
    if f"pretrain/{SPARK}" in CASES:  # with timm
        passes["spark"] = partial(spark_pass, folder=known.spark)
    return made + [_case(name, build, own, dtype, threads) for name, build in passes.items()]


def _case(
    name: str,
    build: Callable[..., Comparison],
    setting: Setting,
    dtype: torch.dtype,
    threads: int,
) -> Case:
    function = build.func if isinstance(build, partial) else build
    about = (function.__doc__ or "").splitlines()[0]
    at = {"op": PREFIX + name, "axis": "peer", "batch": setting.batch_size, "threads": threads}
    return Case(
        PREFIX + name,
        about,
        lambda _, dtype: build(setting, dtype),
        emulated=False,
        dtypes=(dtype,),
        threads=threads,
        at=at,
    )


# -- ConvMAE and FastConvMAE ----------------------------------------------------------------------


class DenseFastConvMAE(FastConvMAE):
    """FastConvMAE as its own code runs it, in our layers: the same parameters, the same numbers.

    A picture's `G` masks complement each other. All positions are computed once; the depthwise
    convolution is computed of the picture times each mask, and each of its `G` results is
    multiplied by that mask again before they are added up.
    """

    predicts_every_patch = True

    def forward_stages(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """The map of stage 2 `[N, C, 2 * gh, 2 * gw]` and both stages' outputs as `[N, L, D]`."""
        x = images.contiguous(memory_format=torch.channels_last)
        decoded = []
        for embed, blocks, decode, side in (
            (self.patch_embed1, self.blocks1, self.stage1_output_decode, 4),
            (self.patch_embed2, self.blocks2, self.stage2_output_decode, 2),
        ):
            x = embed_map(x, embed)
            views = mask.to_dense(side).to(x.dtype).split(len(images))
            for block in blocks:
                x = _block_of_views(x, block, views)
            decoded.append(flat_map(conv_map(x, decode)))
        return x, decoded[0], decoded[1]

    def embed(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """As in `ConvMAE`: computed once for all patches, then gathered for each mask."""
        x, decoded1, decoded2 = self.forward_stages(images, mask)
        x = add_parameter(tokens_of_map(self, x), self.pos_embed)
        index = mask.block_index % (len(images) * self.num_patches)
        one, two, three = (
            tokens.flatten(0, 1).index_select(0, index) for tokens in (x, decoded1, decoded2)
        )
        return one, two, three


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _block_of_views(x: Tensor, block: ConvBlock, views: Sequence[Tensor]) -> Tensor:
    """A block of stage 1 or 2; `views` are masks `[N, 1, H, W]` that complement each other."""
    y = conv_map(_norm(x, block.norm1), block.conv1)
    seen = [view * conv_map(view * y, block.attn) for view in views]
    x = x + conv_map(sum(seen[1:], seen[0]), block.conv2)
    y = block.mlp.act(conv_map(_norm(x, block.norm2), block.mlp.fc1))
    return x + conv_map(y, block.mlp.fc2)


def convmae_pass(setting: Setting, dtype: torch.dtype, folder: str | None) -> Comparison:
    """ConvMAE forward and backward: packed, dense in our layers, and the official code."""
    built = {kind: models.build(setting, kind) for kind in ("packed", "dense")}
    ways: Ways = {kind: (model, _forward(model)) for kind, model in built.items()}
    notes = _official(ways, checkouts.convmae, folder, "ConvMAE", "--official", setting)
    parameters = models.parameters(setting.model)
    pixels = setting.batch_size * 3 * setting.img_size**2
    counted = work.training_work(parameters, setting.block_mask(), pixels, optimizer=False)
    return _passes(ways, setting, dtype, counted, notes)


def fastconvmae_pass(setting: Setting, dtype: torch.dtype, folder: str | None) -> Comparison:
    """FastConvMAE forward and backward: packed, its own way in our layers, the official code."""
    torch.manual_seed(0)
    name = setting.model.replace("convmae", "fastconvmae")
    options = {"img_size": setting.img_size, "norm_pix_loss": True}
    packed = convmae.create_model(name, **options)
    assert isinstance(packed, FastConvMAE)
    dense = DenseFastConvMAE(**packed.config)
    dense.load_state_dict(packed.state_dict())
    ways: Ways = {
        kind: (model.to(setting.device), _forward(model))
        for kind, model in (("packed", packed), ("dense", dense))
    }
    notes = _official(
        ways, checkouts.fastconvmae, folder, "FastConvMAE", "--official_fast", setting
    )
    return _passes(ways, setting, dtype, work.Work(0), notes)


def _forward(model: nn.Module) -> Forward:
    return lambda setting, images, noise: model(images, setting.mask_ratio, noise).loss


def _official(
    ways: Ways,
    load: Callable[[str, Setting], nn.Module],
    folder: str | None,
    name: str,
    option: str,
    setting: Setting,
) -> list[str]:
    """Adds the official code, with the parameters of "packed"; or a note why it is left out."""
    if folder is None:
        return [f"official {name}: left out, no checkout of its code was named ({option})"]
    try:
        model = load(folder, setting)
    except CheckoutError as error:
        return [f"official {name}: left out, {error}"]
    model.load_state_dict(ways["packed"][0].state_dict())

    def forward(setting: Setting, images: Tensor, noise: Tensor) -> Tensor:
        with checkouts.given_noise(noise):
            return model(images, mask_ratio=setting.mask_ratio)[0]

    ways["official"] = model.to(setting.device), forward
    return []


def _passes(
    ways: Ways,
    setting: Setting,
    dtype: torch.dtype,
    counted: work.Work,
    notes: list[str],
) -> Comparison:
    """Forward and backward of models with parameters of the same names."""
    pixels, noise = models.images(setting), setting.noise()
    contenders = []
    for kind, (model, forward) in ways.items():
        run = partial(_pass, model, forward, setting, dtype, pixels, noise)
        contenders.append(Contender(kind, run, partial(_result, model)))
    return Comparison(contenders, counted, clock_for(setting.device), notes=notes)


def _pass(
    model: nn.Module,
    forward: Forward,
    setting: Setting,
    dtype: torch.dtype,
    pixels: Tensor,
    noise: Tensor,
) -> Tensor:
    model.zero_grad()
    with models.autocast(setting, dtype):
        loss = forward(setting, pixels, noise)
    loss.backward()
    return loss.detach()


def _result(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """The loss, and the norms of the gradients by the name of their parameter."""
    named = sorted(model.named_parameters())
    norms = [p.grad.norm() for _, p in named if p.grad is not None]
    return [loss, torch.stack(norms)]


# -- SparK ----------------------------------------------------------------------------------------


def spark_pass(setting: Setting, dtype: torch.dtype, folder: str | None) -> Comparison:
    """SparK's ResNet-50 forward and backward: packed, dense in our layers, the official code.

    The losses are compared; gradients through ReLUs and BatchNorm differ by more than roundings.
    """
    passes = {
        kind: pretraining.Step(SPARK, setting, dtype, kind).differentiate
        for kind in ("packed", "dense")
    }
    contenders = [Contender(kind, run, lambda loss: [loss]) for kind, run in passes.items()]
    comparison = Comparison(contenders, work.Work(0), clock_for(setting.device))
    if folder is None:
        note = "official SparK: left out, no checkout of its code was named (--spark)"
        return replace(comparison, notes=[note])
    ours = pretraining.build(SPARK, setting, "packed")
    try:
        official = checkouts.OfficialSparK(
            folder, pretraining.STEPS[SPARK][1], setting, networks.MASK_RATIO
        )
    except CheckoutError as error:
        return replace(comparison, notes=[f"official SparK: left out, {error}"])
    missing, unexpected = official.model.load_state_dict(ours.state_dict(), strict=False)
    wrong = [key for key in missing if key not in ("imn_m", "imn_s", "norm_black")]
    if wrong or unexpected:
        raise DisagreementError(f"SparK's parameters have other names: {[*wrong, *unexpected]}")
    official.model.to(setting.device, memory_format=torch.channels_last).train()
    pixels = models.images(setting).contiguous(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(setting.batch_size, ours.num_patches, generator=generator)
    visible = ours.make_mask(pixels, None, noise.to(setting.device)).visible.unsqueeze(1)

    def forward(setting: Setting, images: Tensor, visible: Tensor) -> Tensor:
        return official(images, visible)

    run = partial(_pass, official.model, forward, setting, dtype, pixels, visible)
    contenders = [*comparison.contenders, Contender("official", run, lambda loss: [loss])]
    return replace(comparison, contenders=contenders)


# -- spconv ---------------------------------------------------------------------------------------


def spconv_layer(setting: Setting, dtype: torch.dtype) -> Comparison:
    """A dense 3x3 convolution of 64 channels, forward: packed, map x mask, and spconv's SubMConv2d.

    spconv has no depthwise convolution, and on a CPU no gradients. It is called `SPCONV_CALLS`
    times before it is timed; if one result is wrong, it is left out.
    """
    x, mask, side, channels = feature_map(
        setting, dtype, Sizes(4, SPCONV_CHANNELS, 1 - setting.mask_ratio)
    )
    visible = mask.to_dense(side).to(dtype)
    weight = setting.randn(channels, channels, 3, 3, seed=2).to(dtype) / (3 * channels**0.5)
    features = ck.gather_visible(x, mask)

    def packed() -> Tensor:
        return ck.masked_conv2d(features, weight, None, mask, padding=1)

    def dense() -> Tensor:
        return conv2d(x * visible, weight, None, padding=1)

    def as_packed(y: Tensor) -> list[Tensor]:
        return [ck.gather_visible(y, mask)]

    contenders = [
        Contender("packed", packed, lambda y: [y]),
        Contender("dense", dense, as_packed),
    ]
    notes = []
    try:
        spconv = importlib.import_module("spconv.pytorch")
    except ImportError as error:
        notes.append(f"spconv: left out, not installed: {error}")
    else:
        run, result = _spconv(spconv, x * visible, mask.to_dense(side)[:, 0], weight, as_packed)
        expected = packed()
        contenders.append(Contender("spconv", _checked(run, result, expected), result))
    positions = mask.num_visible * side * side
    counted = work.Work(
        (2 * positions * channels + weight.numel()) * dtype.itemsize,
        2 * positions * weight.numel(),
        2 * positions * weight.numel(),
    )
    return Comparison(contenders, counted, clock_for(setting.device), notes=notes)


def _spconv(
    spconv: Any,
    x: Tensor,
    visible: Tensor,
    weight: Tensor,
    as_packed: Callable[[Tensor], list[Tensor]],
) -> tuple[Callable[[], Tensor], Callable[[Tensor], list[Tensor]]]:
    """spconv's convolution of the rows of `x` `[N, C, H, W]` at visible positions `[N, H, W]`.

    The pairs of positions are found once and kept, as our mask keeps its table of neighbours.
    """
    n, channels, height, width = x.shape
    on_cpu = x.device.type == "cpu"
    options = {"indice_key": "mask"} | ({"algo": spconv.ConvAlgo.Native} if on_cpu else {})
    conv = spconv.SubMConv2d(channels, len(weight), 3, padding=1, bias=False, **options)
    conv = conv.to(x.device, x.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight.permute(0, 2, 3, 1))
    rows = x.permute(0, 2, 3, 1)[visible].contiguous()
    index = visible.nonzero().int().contiguous()  # others are read wrongly, without an error

    sparse = spconv.SparseConvTensor(rows, index, [height, width], n)
    with torch.no_grad():
        sparse.indice_dict = conv(sparse).indice_dict

    @torch.no_grad()
    def run() -> Tensor:
        return conv(sparse).features

    def result(y: Tensor) -> list[Tensor]:
        dense = y.new_zeros(n, height, width, y.shape[1])
        dense[visible] = y
        return as_packed(dense.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last))

    return run, result


def _checked(
    run: Callable[[], Tensor], result: Callable[[Tensor], list[Tensor]], expected: Tensor
) -> Callable[[], Tensor]:
    """`run`, of which the first call is many, all of which must be right.

    The function raises DisagreementError where some are not.
    """
    is_right = False

    def checked() -> Tensor:
        nonlocal is_right
        if not is_right:
            errors = []
            for _ in range(SPCONV_CALLS):
                try:
                    both = {"spconv": result(run()), "packed": [expected]}
                    check_agreement(both, TOLERANCE[expected.dtype], "packed")
                except DisagreementError as error:
                    errors.append(str(error))
            if errors:
                raise DisagreementError(
                    f"{len(errors)} of {SPCONV_CALLS} calls with {torch.get_num_threads()} "
                    f"threads are wrong: {errors[0]}"
                )
            is_right = True
        return run()

    return checked
