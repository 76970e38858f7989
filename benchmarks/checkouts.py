"""The published code of ConvMAE, FastConvMAE and SparK, from a checkout that the user names.

The files are imported as they are. What they need of packages of their time is stood in for while
they are imported and a model is made; what they change in timm is in force while they run, and no
longer:

- `timm.models.registry.register_model` does nothing: FastConvMAE's `vision_transformer.py` and
  SparK's ConvNeXt would take the places of timm's own networks of these names.
- `numpy.float` is `float`, as it was before NumPy 1.24.
- `timm.models.layers.drop` is `timm.layers.drop`, where it is now.
- `pytz` and `torch.utils.tensorboard` are empty where they are not installed: for logs only.
- SparK's `ResNet.forward` takes the place of timm's while SparK's network runs.
- `torch.rand` of ConvMAE and FastConvMAE gives the noise of the benchmark's masks.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy
import torch

from benchmarks.runner import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from benchmarks.setting import Setting

IMG_SIZE = 224  # the only one that their masks are written for


class CheckoutError(RuntimeError):
    """A checkout cannot be run; the message says why."""


def convmae(folder: str, setting: Setting) -> nn.Module:
    """The official ConvMAE-Base for pretraining.

    Raises:
        CheckoutError: the folder is not a checkout, or the setting is none that it can do.
    """
    _check_convmae(setting)
    with imported(Path(folder), "models_convmae") as (module,):
        return module.convmae_convvit_base_patch16(norm_pix_loss=True)


def fastconvmae(folder: str, setting: Setting) -> nn.Module:
    """The official FastConvMAE-Base for pretraining, which knows 75 % hidden only.

    Raises:
        CheckoutError: the folder is not a checkout, or the setting is none that it can do.
    """
    _check_convmae(setting)
    if setting.mask_ratio != 0.75:
        raise CheckoutError(f"it hides 75 % only, and {setting.mask_ratio:.0%} are to be hidden")
    with imported(Path(folder), "models_fastconvmae") as (module,):
        return module.fastconvmae_convvit_base_patch16(norm_pix_loss=True)


def _check_convmae(setting: Setting) -> None:
    if setting.img_size != IMG_SIZE:
        raise CheckoutError(
            f"its masks are for {IMG_SIZE} x {IMG_SIZE} pixels only, and pictures have "
            f"{setting.img_size}"
        )
    if setting.model != "convmae_base":
        raise CheckoutError(f"it has the base model only, and {setting.model} is to be measured")


@contextlib.contextmanager
def given_noise(noise: Tensor) -> Iterator[None]:
    """`torch.rand` of the noise's shape gives the noise; of any other it is an error."""

    def rand(*shape: int, **_: Any) -> Tensor:
        if shape != tuple(noise.shape):
            raise CheckoutError(f"it draws noise of {list(shape)}, not {list(noise.shape)}")
        return noise

    with mock.patch.object(torch, "rand", rand):
        yield


class OfficialSparK:
    """The official SparK of a ResNet, without stochastic depth.

    Attributes:
        model: the module.

    Raises:
        CheckoutError: the folder is not a checkout.
    """

    def __init__(self, folder: str, network: str, setting: Setting, mask_ratio: float) -> None:
        from timm.models.resnet import ResNet

        self._resnet, plain = ResNet, ResNet.forward
        try:
            names = ("models", "spark", "decoder")
            with imported(Path(folder) / "pretrain", *names) as (models, spark, decoder):
                self._forward = ResNet.forward
                options = models.pretrain_default_model_kwargs[network] | {"drop_path_rate": 0.0}
                with mock.patch.dict(models.pretrain_default_model_kwargs, {network: options}):
                    encoder = models.build_sparse_encoder(network, input_size=setting.img_size)
                self.model = spark.SparK(
                    encoder,
                    decoder.LightDecoder(encoder.downsample_raito, sbn=False),
                    mask_ratio=mask_ratio,
                )
        finally:
            ResNet.forward = plain

    def __call__(self, images: Tensor, visible: Tensor) -> Tensor:
        """The loss; `visible` is bool `[N, 1, gh, gw]`."""
        with mock.patch.object(self._resnet, "forward", self._forward):
            return self.model(images, active_b1ff=visible)


@contextlib.contextmanager
def imported(folder: Path, *names: str) -> Iterator[tuple[Any, ...]]:
    """Modules of a folder, as if it were the current one; their names are free again afterwards.

    Raises:
        CheckoutError: the folder lacks one of them, or it cannot be imported or used.
    """
    missing = [
        name
        for name in names
        if not (folder / f"{name}.py").exists() and not (folder / name / "__init__.py").exists()
    ]
    if missing:
        raise CheckoutError(f"{folder} has no {', '.join(missing)}: it is no checkout of that code")
    before, path = dict(sys.modules), list(sys.path)
    own = {p.stem if p.suffix == ".py" else p.name for p in folder.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    try:
        with _stand_ins(), contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.path.insert(0, str(folder))
            try:
                yield tuple(importlib.import_module(name) for name in names)
            except CheckoutError:
                raise
            except Exception as error:
                raise CheckoutError(one_line(error)) from error
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        sys.modules.update({k: v for k, v in before.items() if k.partition(".")[0] in own})


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """What the module's docstring says of imports."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm.models.layers
            import timm.models.registry
    except ImportError as error:
        raise CheckoutError(f"it needs timm: {error}") from error
    empty = {}
    for package, name in (("pytz", "pytz"), ("tensorboard", "torch.utils.tensorboard")):
        if name not in sys.modules and importlib.util.find_spec(package) is None:
            empty[name] = types.ModuleType(name)
            empty[name].SummaryWriter = None  # type: ignore[attr-defined]
    drop = importlib.import_module("timm.layers.drop")
    sys.modules.update(empty)
    try:
        with (
            mock.patch.object(timm.models.registry, "register_model", lambda function: function),
            mock.patch.object(timm.models.layers, "drop", drop, create=True),
            mock.patch.object(numpy, "float", float, create=True),
        ):
            yield
    finally:
        for name in empty:
            del sys.modules[name]
