"""Programs that make their mask themselves: exported, as ONNX files, traced."""

import warnings

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.testing import random_tensor
from tests.convmae_kernels.test_transforms import CHANNELS, GRID, Net
from tests.support.onnx_files import check_plain, export_onnx, run_onnx

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps


class Masked(torch.nn.Module):
    """A network that makes its mask itself, from what `make` is given."""

    def __init__(self, make):
        super().__init__()
        self.net, self.make = Net(), make
        self.dense = ck.nn.MaskedConv2d(CHANNELS, 4, 3)
        self.strided = ck.nn.MaskedConv2d(4, 4, 3, stride=2, padding=1, groups=4)

    def forward(self, images, given=None):
        mask = self.make(images.shape[0], given)
        x = self.dense(self.net(images, mask), mask)
        return ck.scatter_visible(self.strided(ck.gather_visible(x, mask), mask), mask)


MASKS = {
    "full": (lambda batch, _: ck.BlockMask.full(batch, GRID), None),
    "noise": (lambda _, noise: ck.BlockMask.from_noise(noise, GRID, 0.5), torch.rand),
    "visible": (
        lambda _, visible: ck.BlockMask.from_visible(visible),
        lambda batch, _: torch.rand(batch, *GRID) < torch.rand(()),
    ),
}
RECORDED = pytest.mark.parametrize("kind", MASKS)


def recorded(kind):
    """A network that makes its mask, and arguments of it for a batch."""
    make, draw = MASKS[kind]

    def arguments(batch):
        given = () if draw is None else (draw(batch, GRID[0] * GRID[1]),)
        return random_tensor((batch, CHANNELS, GRID[0] * 4, GRID[1] * 4)), *given

    return Masked(make).eval(), arguments


@pytest.mark.parametrize(
    ("kind", "strict"), [*((kind, False) for kind in MASKS), ("visible", True)]
)
def test_export_with_a_mask_made_inside(kind, strict):
    net, arguments = recorded(kind)
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in arguments(2))
    program = torch.export.export(net, arguments(2), dynamic_shapes=shapes, strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any("convmae" in target for target in targets) == (kind != "full")
    for number in (1, 4, 7):
        inputs = arguments(number)
        torch.testing.assert_close(program.module()(*inputs), net(*inputs))


@RECORDED
@pytest.mark.thorough(but_every=5)
def test_onnx_with_a_mask_made_inside(kind, tmp_path):
    net, arguments = recorded(kind)
    path = export_onnx(net, arguments(2), tmp_path / "net.onnx")
    check_plain(path)
    for number in (1, 5):
        inputs = arguments(number)
        (found,) = run_onnx(path, *inputs)
        torch.testing.assert_close(torch.from_numpy(found), net(*inputs).detach())


@RECORDED
def test_traces_with_a_mask_made_inside(kind):
    net, arguments = recorded(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; shapes that are checked
        traced = torch.jit.trace(net, arguments(2), check_trace=False)
    for number in (1, 5):
        inputs = arguments(number)
        torch.testing.assert_close(traced(*inputs), net(*inputs))


@pytest.mark.thorough
def test_ties_of_noise_are_the_same_in_onnx(tmp_path):
    class Drawn(torch.nn.Module):
        def forward(self, noise):
            return ck.BlockMask.from_noise(noise, GRID, 0.5).visible

    noise = torch.randint(0, 3, (6, 12)).float()
    path = export_onnx(Drawn(), noise[:2], tmp_path / "net.onnx")
    assert torch.equal(torch.from_numpy(run_onnx(path, noise)[0]), Drawn()(noise))


def test_a_trace_refuses_to_ask_a_mask_for_unknown_numbers():
    class Asked(torch.nn.Module):
        def forward(self, visible):
            return torch.arange(ck.BlockMask.from_visible(visible).max_per_image)

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="jit.trace cannot record a"):
        warnings.simplefilter("ignore")
        torch.jit.trace(Asked(), torch.ones(2, *GRID, dtype=torch.bool))
