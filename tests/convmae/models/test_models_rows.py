"""Blocks whose biases, sums, norms and GELUs are joined as on a GPU: the same numbers, elsewhere.

A CPU stands in for the GPU: there the ops run their reference. Tensors without numbers stand in
for those on a GPU where it matters what is recorded.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import convmae
from convmae.models import layers
from convmae.models.dense_tasks.token_blocks import MapAttention, MapBlock
from convmae_kernels.ops.support import rows

SMALL = {"img_size": 64, "embed_dim": (8, 12, 16), "depth": (1, 2, 2), "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 3, "decoder_num_heads": 2}
JOINED = ["convmae.add_layer_norm.default", "convmae.bias_gelu.default"]


@pytest.fixture
def joined(monkeypatch):
    """Returns a function that says whether the ops on rows run here."""
    return lambda value: monkeypatch.setattr(layers, "has_row_kernels", lambda x: value)


class Recorder(TorchDispatchMode):
    """The ops on rows that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in JOINED:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def step(model, run):
    """The result of a run, its gradients by name, and how often each op on rows ran."""
    torch.manual_seed(1)
    model.zero_grad()
    with Recorder() as recorder:
        y = run()
        y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return y.detach(), grads, [recorder.names.count(name) for name in JOINED]


def pretraining():
    images, noise = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.rand(4, 16)
    model = convmae.ConvMAE(**SMALL, **DECODER).double()
    return model, lambda: model(images, noise=noise).loss, 8


def classification():
    """With stochastic depth, which stands between a product and the sum that it goes into."""
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    model = convmae.ConvViT(**SMALL, drop_path_rate=0.5, num_classes=2).double().train()
    return model, lambda: model(images), 5


def maps():
    """With layer scale."""
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    block = MapBlock(MapAttention(8, 2), 8, 2, 0.0, 1e-6, layer_scale=True).double()
    torch.nn.init.normal_(block.gamma_1)
    return block, lambda: block(x), 1


@pytest.mark.parametrize("make", [pretraining, classification, maps])
def test_joined_is_what_pytorch_gives(make, joined):
    model, run, blocks = make()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, which begin at 0, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    joined(False)
    expected, plain, counts = step(model, run)
    assert counts == [0, 0]
    joined(True)
    found, grads, counts = step(model, run)
    assert counts == [blocks, blocks]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for name, grad in plain.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-10, msg=name)
    if make is pretraining:
        model.set_grad_checkpointing()
        again, grads_again, counts = step(model, run)
        assert counts == [2 * blocks, 2 * blocks]
        assert torch.equal(again, found)
        assert all(torch.equal(grads_again[name], grad) for name, grad in grads.items())


def test_autocast_rounds_less_often(joined, monkeypatch):
    """In bfloat16: closer to float64 than with an op for each step, all in all."""
    monkeypatch.setattr(layers, "FLOAT32_BETWEEN_BLOCKS", frozenset())
    block = layers.Block(64, 2, 4)
    x = torch.randn(4, 50, 64, dtype=torch.bfloat16)
    exact, wide, _ = step(block.double(), lambda: block(x.double()))
    block.float()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    errors = []
    for value in (False, True):
        joined(value)
        y, grads, _ = step(block, run)
        assert y.dtype == torch.bfloat16
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        errors.append([(y - exact).norm() / exact.norm()])
        errors[-1] += [(grads[name] - grad).norm() / grad.norm() for name, grad in wide.items()]
    plain, ours = (torch.stack(each) for each in errors)
    assert (ours / plain).log().mean().exp() < 1.0
    assert (ours < 1.5 * plain + 1e-3).all()


def on_a_gpu():
    """A block and its input, without numbers."""
    with torch.device("cuda"):
        return layers.Block(8, 2, 4).requires_grad_(False), torch.empty(2, 3, 8)


def test_what_is_recorded_for_a_gpu(monkeypatch):
    """Compiled and traced programs hold the ops, in one graph; exported ones PyTorch's alone."""
    monkeypatch.setattr(rows, "_TRITON_RUNS", True)
    compiled = []

    def backend(graph, inputs):
        compiled.append([str(node.target) for node in graph.graph.nodes])
        return graph

    with FakeTensorMode(allow_non_fake_inputs=True), rows.joining_rows():
        block, x = on_a_gpu()
        torch.compile(block, fullgraph=True, backend=backend)(x)
        traced = make_fx(block)(x)
        exported = torch.export.export(block, (x,))
    (names,) = compiled
    assert {name.removesuffix(".default") for name in JOINED} <= {n for n in names}
    assert [n for n in map(target, traced.graph.nodes) if n.startswith("convmae")] == JOINED
    assert not [n for n in map(target, exported.graph.nodes) if n.startswith("convmae")]
    with FakeTensorMode(allow_non_fake_inputs=True), Recorder() as recorder:
        block, x = on_a_gpu()
        block(x)
        monkeypatch.setattr(rows, "_TRITON_RUNS", False)
        with rows.joining_rows():
            block(x)
    assert not recorder.names


def target(node):
    return str(node.target)
