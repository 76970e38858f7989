"""A network that runs on `Packed` compiles as a whole."""

import pytest
import torch

import convmae_kernels as ck

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["convnextv2_atto"])
@pytest.mark.thorough
def test_no_graph_break_and_no_recompilation(name):
    torch.compiler.reset()
    model = timm.create_model(name, num_classes=0).train()
    sparse = ck.sparsify(model)
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)

    def run(module, mask):
        model.zero_grad()
        features = module(images, mask)
        features.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [features.detach(), *(g.clone() for g in grads)]

    def check(mask):
        for found, expected in zip(run(compiled, mask), run(sparse, mask), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    check(ck.BlockMask.random(2, (2, 2), 0.5))
    with torch.compiler.set_stance("fail_on_recompile"):
        check(ck.BlockMask.random(2, (2, 2), 0.5))


def test_functions_of_channels_and_operators():
    """Views in groups, indices, and the operators that PyTorch has written in Python."""
    torch.compiler.reset()

    def function(images, mask):
        x = ck.Packed.gather(images, mask)
        b, c, h, w = x.shape
        y = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        y = (1 - y) ** 2 / torch.arange(1.0, c + 1)[:, None, None] + 2 / (2 + x.sigmoid())
        y[:, :2] = y[:, 2:4] // 0.5
        y = y + torch.stack([x, y], 1).softmax(1).sum(1) * y.flatten(2).softmax(-1).view(y.shape)
        return torch.cat([y[:, ::2], y.amax(1).unsqueeze(1)], 1).features

    images, mask = torch.randn(2, 4, 8, 8), ck.BlockMask.random(2, (2, 2), 0.5)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, mask), function(images, mask))
