"""What `Packed` does not do, and how it says so."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convmae_kernels as ck
from convmae_kernels.testing import make_mask
from tests.support.packed_maps import B, C, H, W, assert_same, make_map, pack

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# -- errors -------------------------------------------------------------------------------------


class Calls(nn.Module):
    """A module that does something with its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


UNSUPPORTED = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(B, -1),
    "reshape": lambda x: torch.reshape(x, (B, -1)),
    "__getitem__": lambda x: x[:2],
    "__setitem__": lambda x: x.__setitem__(0, 1.0),
    "__matmul__": lambda x: x @ torch.eye(W, dtype=torch.float64),
    "__bool__": lambda x: 1 if x > 0 else 2,
    "pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "softmax": lambda x: x.softmax(2),
    "roll": lambda x: torch.roll(x, 1, 2),
    "unfold": lambda x: F.unfold(x, 3),
    "stack": lambda x: torch.stack([x, x], 0),
    "matmul": lambda x: torch.matmul(x, x),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "interpolate": lambda x: F.interpolate(x, scale_factor=3, mode="bilinear"),
    "is_contiguous": lambda x: x.is_contiguous(),
}
WHY = {
    **dict.fromkeys(("flatten", "view", "reshape"), "a view of .* mixes channels, positions"),
    **dict.fromkeys(("__getitem__", "__setitem__"), "it chooses among images"),
    **dict.fromkeys(("softmax", "roll"), "only along channels, got dim=2, the rows of BCHW"),
    **dict.fromkeys(("matmul", "__matmul__"), "attention looks at all positions"),
    "pad": "mode='circular' shows the opposite side",
    "unfold": "its columns are positions of a dense map",
    "stack": "only channels are stacked",
    "interpolate": "only a factor that is a power of two",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operations_are_named(name):
    function = UNSUPPORTED[name]
    why = WHY.get(name, "packed features do not have it")
    with pytest.raises(NotImplementedError, match=f"^{name} in Calls.forward: {why}.*dense()"):
        nn.Sequential(nn.Identity(), Calls(function))(pack(make_map()))
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        function(pack(make_map()))


def rejects(error, message, module, *arguments):
    with pytest.raises(error, match=re.escape(message)):
        (module.double() if isinstance(module, nn.Module) else module)(*arguments)


ONLY = NotImplementedError
UNSUPPORTED_MODULES = [  # module, its input, error, how the message begins or what it holds
    (
        lambda: nn.ConvTranspose2d(C, 4, 3, 3),
        "channels first",
        ValueError,
        "conv_transpose2d in ConvTranspose2d.forward: stride must be a power of two",
    ),
    (
        lambda: nn.ConvTranspose2d(C, 4, 3, 2),
        "channels first",
        ValueError,
        "conv_transpose2d in ConvTranspose2d.forward: padding must keep the grid of blocks",
    ),
    (
        lambda: nn.Conv2d(C, 4, 3),
        "channels first",
        ValueError,
        "conv2d in Conv2d._conv_forward: padding must keep the grid of blocks",
    ),
    (
        lambda: nn.Conv2d(C, 4, 8, 8),
        "channels first",
        ValueError,
        "conv2d in Conv2d._conv_forward: stride must be a power of two",
    ),
    (
        lambda: nn.Conv2d(C + 1, 4, 3, padding=1),
        "channels first",
        ValueError,
        "conv2d in Conv2d._conv_forward: x has 6 channels, but weight",
    ),
    (
        lambda: nn.Conv2d(C, 4, 3, padding=1, padding_mode="circular"),
        "channels first",
        ONLY,
        "pad in Conv2d._conv_forward: mode='circular' shows the opposite side",
    ),
    (
        lambda: nn.Conv2d(C, 4, 3, padding=1),
        "channels last",
        ValueError,
        "conv2d in Conv2d._conv_forward: it needs [B, C, H, W], got (4, 12, 16, 6)",
    ),
    (
        lambda: nn.Linear(C, 4),
        "channels first",
        ValueError,
        "linear in Linear.forward: it needs [B, H, W, C], got (4, 6, 12, 16)",
    ),
    (
        lambda: nn.LayerNorm(C),
        "channels first",
        ValueError,
        "layer_norm in LayerNorm.forward: it needs [B, H, W, C] and a norm over C",
    ),
    (
        lambda: nn.LayerNorm((W, C)),
        "channels last",
        ValueError,
        "layer_norm in LayerNorm.forward: it needs [B, H, W, C] and a norm over C",
    ),
    (
        lambda: nn.BatchNorm2d(C),
        "channels last",
        ValueError,
        "batch_norm in BatchNorm2d.forward: it needs [B, C, H, W]",
    ),
    (
        lambda: nn.GroupNorm(2, C),
        "channels last",
        ValueError,
        "group_norm in GroupNorm.forward: it needs [B, C, H, W]",
    ),
    (
        lambda: nn.MaxPool2d(2),
        "channels last",
        ValueError,
        "max_pool2d in MaxPool2d.forward: it needs [B, C, H, W]",
    ),
    (
        lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        "channels first",
        ValueError,
        "max_pool2d in MaxPool2d.forward: ceil_mode=True would make a larger map",
    ),
    (
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        "channels first",
        ValueError,
        "avg_pool2d in AvgPool2d.forward: ceil_mode=True would make a larger map",
    ),
    (
        lambda: nn.MaxPool2d(2, return_indices=True),
        "channels first",
        ONLY,
        "in MaxPool2d.forward: there are no indices of maxima",
    ),
    (
        lambda: nn.LPPool2d(2, 2),
        "channels first",
        ONLY,
        "lp_pool2d in LPPool2d.forward: a norm over windows",
    ),
    (
        lambda: nn.AdaptiveAvgPool2d(7),
        "channels first",
        ONLY,
        "adaptive_avg_pool2d in AdaptiveAvgPool2d.forward: only an output of 1 x 1",
    ),
    (
        lambda: nn.AdaptiveMaxPool2d((7, 1)),
        "channels first",
        ONLY,
        "in AdaptiveMaxPool2d.forward: only an output of 1 x 1",
    ),
    (
        lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True),
        "channels first",
        ValueError,
        "interpolate in Upsample.forward: align_corners=True is not supported",
    ),
    (
        lambda: nn.Upsample(scale_factor=3),
        "channels first",
        ONLY,
        "interpolate in Upsample.forward: only a factor that is a power of two",
    ),
    (
        lambda: nn.Upsample(scale_factor=0.125),
        "channels first",
        ValueError,
        "interpolate in Upsample.forward: scale_factor must be a power of two",
    ),
    (
        lambda: nn.Upsample(size=(2 * H, W)),
        "channels first",
        ONLY,
        "interpolate in Upsample.forward: only a factor that is a power of two",
    ),
    (
        lambda: nn.Upsample(scale_factor=(2, 4)),
        "channels first",
        ONLY,
        "interpolate in Upsample.forward: only a factor that is a power of two",
    ),
    (
        lambda: nn.Upsample(scale_factor=16),
        "channels first",
        ValueError,
        "interpolate in Upsample.forward: scale_factor must be a power of two",
    ),
    (lambda: nn.Flatten(), "channels first", ONLY, "flatten in Flatten.forward"),
]


@pytest.mark.parametrize(("make", "layout", "error", "message"), UNSUPPORTED_MODULES)
def test_modules_that_are_not_supported_are_named(make, layout, error, message):
    rejects(error, message, make(), pack(make_map(), layout == "channels last"))


def test_operands_that_do_not_fit_are_named():
    x = pack(make_map())
    other = pack(make_map(), mask=ck.BlockMask.full(B, (3, 4)))
    last, small = pack(make_map(), True), F.max_pool2d(x, 2)

    def with_x(function):
        return Calls(lambda y: function(x, y))

    for y, why in (
        (other, "two Packed of one operation have different masks"),
        (last, "two Packed of one operation have shapes (4, 6, 12, 16) and (4, 12, 16, 6)"),
        (small, "two Packed of one operation have shapes (4, 6, 12, 16) and (4, 6, 6, 8)"),
    ):
        rejects(ValueError, f"add in Calls.forward: {why}", with_x(torch.add), y)
        rejects(ValueError, f"__mul__ in Calls.forward: {why}", with_x(lambda a, b: a * b), y)
        rejects(
            ValueError, f"cat in Calls.forward: {why}", with_x(lambda a, b: torch.cat([a, b], 1)), y
        )
    for shape in (
        (C,),
        (C + 1, 1, 1),
        (B, C, H),
        (2, 1, 1, 1),
        (H + 1, W),
        (1, B, C, 1, 1),
        (B, C, H, 1),
        (B, C, 1, W),
    ):
        why = f"{list(shape)} does not broadcast with (4, 6, 12, 16)"
        plain = torch.zeros(shape, dtype=torch.float64)
        rejects(ValueError, f"mul in Calls.forward: {why}", with_x(torch.mul), plain)
        rejects(ValueError, f"add in Calls.forward: {why}", with_x(lambda a, b: b + a), plain)
    rejects(
        ValueError,
        "cat in Calls.forward: all tensors must be Packed",
        with_x(lambda a, b: torch.cat([a, b], 1)),
        make_map(),
    )
    rejects(
        NotImplementedError,
        "cat in Calls.forward: only along channels, got dim=2",
        with_x(lambda a, b: torch.cat([a, b], 2)),
        x,
    )
    rejects(
        NotImplementedError,
        "chunk in Calls.forward: only along channels, got dim=0",
        with_x(lambda a, b: b.chunk(2)),
        x,
    )
    rejects(
        NotImplementedError,
        "mean in Calls.forward: it reduces channels, or all positions of an image (rows",
        with_x(lambda a, b: b.mean(2)),
        x,
    )
    rejects(
        NotImplementedError,
        "norm in Calls.forward: only a norm of positive p is supported, got p=0",
        with_x(lambda a, b: b.norm(0, (2, 3))),
        x,
    )


def test_equal_masks_need_not_be_the_same_object():
    a, b = make_map(), make_map()
    x, y = pack(a, mask=make_mask("ragged")), pack(b, mask=make_mask("ragged"))
    assert x.mask is not y.mask
    assert_same(x + y, a + b)
    assert_same(torch.cat([x, y], 1), torch.cat([a, b], 1))


def test_the_innermost_module_is_named():
    class Inner(nn.Module):
        def helper(self, x):
            return F.pad(x, (1, 1), mode="circular")

        def forward(self, x):
            return self.helper(x)

    with pytest.raises(NotImplementedError, match=r"^pad in Inner\.helper: "):
        nn.Sequential(nn.Sequential(Inner()), nn.ReLU())(pack(make_map()))
