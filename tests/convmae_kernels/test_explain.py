"""What `ck.explain` says runs is what runs, and its numbers are those of the plan."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import convmae_kernels as ck
from convmae_kernels.ops.support.dispatch import WHY_NOT_COMPILED

needs_library = pytest.mark.skipif(WHY_NOT_COMPILED is not None, reason="no compiled library")
H100 = {"device": "cuda", "capability": (9, 0)}
STAGE1 = {"side": 4, "channels": 256, "kernel": 5, "groups": 256, "dtype": torch.bfloat16}


@pytest.fixture
def random_mask():
    return ck.BlockMask.random(2, (4, 4), 0.5, torch.Generator().manual_seed(0))


def steps(explained, phase="forward"):
    return [s for s in explained.steps if s.phase == phase and s.implementation != "pytorch"]


@needs_library
def test_a_depthwise_convolution_on_a_gpu_that_is_not_there():
    found = ck.explain("masked_conv2d", **STAGE1, **H100)
    (forward,) = steps(found)
    features, table = 2 * 6272 * 16 * 256, 4 * 9 * 6272
    assert (found.plan.way, forward.implementation, forward.kernel) == (
        "depthwise",
        "cuda",
        "tiles",
    )
    assert forward.reason == "a square kernel of 5 on tiles of 4 x 4"
    assert forward.bytes == 2 * features + table + 2 * 256 * 26
    assert found.floors == {
        "forward": 2 * features + 2 * 256 * 26,
        "backward": 3 * features + 2 * 256 * (25 + 26),
    }
    (grads,) = steps(found, "backward")
    shares = int(grads.plan["share_bytes"])
    assert (grads.op, grads.kernel) == ("masked_conv2d_grads", "tiles")
    assert shares % (26 * 256 * 4) == 0
    assert grads.bytes == 3 * features + table + 2 * 256 * (25 + 25 + 1) + 2 * shares
    said = str(found)
    assert f"{grads.plan['runs']} runs of " in said and "way 'depthwise'" in said
    assert "on a CUDA GPU of compute capability 9.0" in said


@needs_library
def test_the_weight_gradient_alone_is_cut_as_planned():
    """docs/kernels.md has the same problem."""
    mask = ck.BlockMask.from_noise(torch.empty(128, 196, device="meta"), (14, 14), 0.75)
    x = torch.empty(6272, 16, 256, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(256, 1, 5, 5, dtype=torch.bfloat16, device="meta", requires_grad=True)
    found = ck.explain(ck.masked_conv2d, x, weight, None, mask, groups=256, capability=(9, 0))
    (step,) = steps(found, "backward")
    assert step.op == "masked_conv2d_weight_grad"
    assert (step.plan["runs"], int(step.plan["share_bytes"])) == ("161", 161 * 26 * 256 * 4)


@needs_library
def test_seven_by_seven_of_a_half_type():
    shape = {"side": 8, "channels": 96, "kernel": 7, "groups": 96, "batch": 2}
    found = ck.explain("masked_conv2d", **shape, dtype=torch.bfloat16, **H100)
    (forward,), (grads,) = steps(found), steps(found, "backward")
    reason = "a square kernel of 7 by tensor cores on tiles of 4 x 4"
    assert (forward.kernel, forward.reason) == ("tensor", reason)
    assert grads.kernel == "any" and grads.reason.startswith("one after the other: ")
    features = 2 * 2 * 49 * 64 * 96
    assert grads.bytes > 4 * features  # the gradient of the output is read twice
    wide = ck.explain("masked_conv2d", **shape, **H100)
    assert [s.kernel for s in wide.steps] == ["tiles", "tiles"]


@needs_library
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"channels": 255, "groups": 255}, "the channels do not fill words of 4 bytes"),
        ({"dtype": torch.float64}, "float64 has no other kernel"),
        ({"kernel": 9}, "the kernel is not 3 x 3, 5 x 5 or 7 x 7"),
        ({"kernel": (3, 5)}, "the kernel is not 3 x 3, 5 x 5 or 7 x 7"),
        ({"dilation": 2}, "the kernel is dilated"),
        ({"side": 1}, "blocks are single positions"),
    ],
)
def test_why_a_shape_runs_on_the_kernel_for_any(changes, reason):
    found = ck.explain("masked_conv2d", batch=2, **{**STAGE1, **changes}, **H100)
    kernels = {(s.kernel, s.reason) for s in found.steps if s.kernel}
    assert kernels == {("any", reason)}


@needs_library
def test_the_call_itself_on_features_that_are_not_aligned(random_mask):
    room = torch.zeros(1 + random_mask.num_visible * 16 * 8, dtype=torch.bfloat16)
    x = room[1:].view(-1, 16, 8)
    weight = torch.zeros(8, 1, 3, 3, dtype=torch.bfloat16)
    found = ck.explain(ck.masked_conv2d, x, weight, None, random_mask, groups=8, capability=(8, 6))
    (forward,) = found.steps  # nothing has a gradient
    assert forward.reason == "the features do not begin at a multiple of 4 bytes"
    aligned = ck.explain(
        ck.masked_conv2d, x.clone(), weight, None, random_mask, groups=8, capability=(8, 6)
    )
    assert aligned.steps[0].kernel == "tiles" and "backward" not in aligned.floors


@pytest.mark.parametrize("groups", [8, 2, 1])
def test_what_it_says_runs_is_what_runs_on_the_cpu(random_mask, groups):
    conv = ck.nn.MaskedConv2d(8, 8, 3, groups=groups)
    x = torch.randn(random_mask.num_visible, 16, 8, requires_grad=True)
    found = ck.explain(conv, x, random_mask)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        conv(x, random_mask).sum().backward()
    ran = {e.name.partition("::")[2] for e in profiler.events() if e.name.startswith("convmae::")}
    said = {s.op for s in found.steps if s.implementation in ("cpu", "reference")}
    assert said and said <= ran
    assert ran - said <= {"window_conv2d", "neighbour_table"}  # made of others, or by the mask
    assert conv.weight.grad is not None and all(p.device.type == "cpu" for p in conv.parameters())


def test_ways_of_other_convolutions_and_ops():
    shape = {"side": 4, "channels": 64, "batch": 2, "dtype": torch.bfloat16}
    names = [s.op for s in ck.explain("masked_conv2d", kernel=3, **shape, **H100).steps]
    assert names[0] == "gather_windows" and "mm" in names
    product = ck.explain("masked_conv2d", kernel=1, **shape, **H100)
    assert product.plan.way == "product" and {s.implementation for s in product.steps} == {
        "pytorch"
    }
    for name, opposite in [
        ("gather_visible", "scatter_visible"),
        ("scatter_visible", "gather_visible"),
        ("gather_windows", "gather_windows_grad"),
    ]:
        found = ck.explain(name, **shape, **H100)
        assert [s.op for s in found.steps] == [name, opposite]
        for phase, floor in found.floors.items():
            assert floor <= found.bytes(phase) <= 1.01 * floor  # the table of neighbours
    found = ck.explain("masked_conv_transpose2d", kernel=3, padding=1, **shape)
    assert "tap_conv2d" in str(found) or "gather_windows" in str(found)


def test_an_implementation_that_was_named_is_never_replaced():
    shape = {"side": 4, "channels": 8}
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run: the device is no CUDA GPU"):
        ck.explain("masked_conv2d", **shape, impl="cuda")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: with kernel .* one matrix"):
        ck.explain("masked_conv2d", kernel=1, **shape, **H100, impl="triton")
    with pytest.raises(RuntimeError, match="impl='no' cannot run: it is not one of reference, cpu"):
        ck.explain("masked_conv2d", **shape, impl="no")
    named = ck.explain("masked_conv2d", groups=8, batch=1, **shape, **H100, impl="triton")
    assert {s.implementation for s in steps(named)} == {"triton"}
    plain = ck.explain("masked_conv2d", groups=8, batch=1, **shape, impl="reference")
    assert not steps(plain) and "times" in str(plain)
    with pytest.raises(ValueError, match="there is no op 'conv', expected one of masked_conv2d"):
        ck.explain("conv")
    with pytest.raises(ValueError, match="side=... and channels=..."):
        ck.explain("masked_conv2d", side=4)
    with pytest.raises(ValueError, match="capability is of CUDA GPUs"):
        ck.explain("masked_conv2d", **shape, device="cpu", capability=(9, 0))
