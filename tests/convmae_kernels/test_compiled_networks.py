"""A network that runs on `Packed` compiles as a whole."""

import pytest
import torch

import convmae_kernels as ck

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["convnextv2_atto"])
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
