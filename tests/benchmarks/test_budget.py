"""What the budget of a training step counts, on ops whose counts are known."""

import pytest
import torch
from torch import nn

from benchmarks import budget, fusion, models, registry, report, runner
from benchmarks.limits import Rates
from benchmarks.setting import Setting
from convmae_kernels.ops import add_layer_norm, bias_gelu
from convmae_kernels.ops.support.dispatch import WHY_NOT_TRITON

TINY = Setting(model="convmae_tiny", batch_size=4, img_size=64)
RATES = Rates(1e9, {torch.float32: 1e9, torch.bfloat16: 1e9})


def counted(function, *arguments):
    counter = budget._Counter()
    with counter:
        function(*arguments)
    return counter.ops


def test_bytes_flops_and_launches_of_ops():
    x, w = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    (forward,) = counted(torch.nn.functional.linear, x, w)
    assert (forward.kind, forward.launches) == ("product", 1)
    assert (forward.bytes, forward.flops) == (4 * (24 + 20 + 30), 2 * 6 * 4 * 5)
    y = x @ w.t()
    ops = counted(torch.autograd.grad, y, (x, w), torch.ones(6, 5))
    assert [op.flops for op in ops] == [240, 240]
    assert not counted(lambda: x.view(4, 6).t()[1:].unsqueeze(0))  # views launch nothing
    (cast,) = counted(lambda: x.to(torch.bfloat16))
    assert (cast.kind, cast.bytes) == ("cast", 24 * 6)
    (repeated,) = counted(lambda: torch.ones(1, 1).expand(100, 100) + x[:1, :1])
    assert repeated.bytes == 4 + 4 + 4 * 100 * 100
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    image = torch.randn(1, 8, 5, 5, requires_grad=True)
    ops = counted(lambda: conv(image).sum().backward())
    flops = {op.name: op.flops for op in ops}
    assert flops["convolution"] == 2 * 8 * 25 * 9
    assert flops["convolution_backward"] == 2 * flops["convolution"]


@pytest.mark.parametrize(("tensors", "size", "launches"), [(3, 10, 1), (65, 10, 2), (2, 2**25, 4)])
def test_launches_of_multi_tensor_ops(tensors, size, launches):
    lists = [[torch.empty(size, device="meta") for _ in range(tensors)] for _ in range(2)]
    (op,) = counted(torch._foreach_copy_, *lists)
    assert (op.launches, op.bytes) == (launches, 2 * 4 * tensors * size)


def test_the_optimizer_reads_gradients_and_writes_the_rest():
    parameters = [nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(6))]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    ops = [op for op in counted(optimizer.step) if op.kind == "optimizer"]
    assert [op.launches for op in ops] == [1]
    steps = 2 * 4  # a count of steps for each parameter, read
    assert ops[0].bytes == 7 * 4 * 16 + steps
    assert ops[0].part == "optimizer"


@pytest.mark.thorough
def test_a_step_is_counted_whole_and_without_numbers():
    counts = {kind: budget.count_step(TINY, torch.bfloat16, kind) for kind in budget.KINDS}
    packed, dense = counts["packed"], counts["dense"]
    assert packed.bytes < dense.bytes and packed.flops < dense.flops
    parts = {op.part for op in packed.ops}
    assert parts == {"mask and loss", "stage 1", "stage 2", "stage 3", "decoder", "optimizer"}
    in_float32 = budget.count_step(TINY, torch.float32, "packed")
    assert not [op for op in in_float32.ops if op.name == "_foreach_copy_"]
    assert in_float32.flops == packed.flops
    text = packed.table(lambda op: op.kind)
    assert sum(int(line.split()[-6]) for line in text.splitlines()) == packed.launches


@pytest.mark.skipif(WHY_NOT_TRITON is not None, reason="Triton's modules say the parts")
def test_what_ops_on_rows_move():
    """Passes over rows, vectors, and sums of parts, which a second launch reads."""
    rows, channels = 100, 24
    whole, vector = 2 * rows * channels, 4 * channels
    x, branch = (torch.zeros(rows, channels, dtype=torch.bfloat16) for _ in range(2))
    vectors = [torch.zeros(channels, requires_grad=True) for _ in range(3)]
    x.requires_grad_()
    with budget._Counter() as counter:
        total, normed = add_layer_norm(x, branch, *vectors[:2], 1e-5, vectors[2])
        y = total + bias_gelu(normed, vectors[0])
        y.backward(x)
    kinds = {op.name: (op.kind, op.launches, op.bytes) for op in counter.ops}
    assert kinds["add_layer_norm"] == ("layer norm", 1, 4 * whole + 3 * vector)
    assert kinds["bias_gelu"] == ("GELU", 1, 2 * whole + vector)
    parts = 4  # of 32 rows; those of the GELU have 64
    read = 4 * whole + vector + 3 * vector
    assert kinds["add_layer_norm_grad"] == ("layer norm", 2, read + 2 * parts * 3 * vector)
    assert kinds["bias_gelu_grad"] == ("GELU", 2, 3 * whole + 2 * vector + 2 * 2 * vector)


@pytest.mark.thorough
def test_parameters_are_cast_a_few_times_not_one_by_one():
    """Of convmae_tiny: a cast and a cast back for each block and each other layer."""
    packed = budget.count_step(TINY, torch.bfloat16, "packed")
    together = [op for op in packed.ops if op.name == "_foreach_copy_"]
    single = [op for op in packed.ops if op.name == "_to_copy"]
    model = models.build(TINY, "packed")
    blocks = sum(
        isinstance(m, budget.layers.Block | budget.layers.ConvBlock) for m in model.modules()
    )
    assert len(together) <= 2 * (blocks + 8)
    assert len(single) <= 20 < sum(1 for _ in model.parameters())


@pytest.mark.thorough
def test_the_cases_make_rows():
    for name in registry.CASES:
        if not name.startswith("budget/"):
            continue
        comparison = registry.CASES[name].build(TINY, torch.bfloat16)
        times = runner.measure(comparison, torch.bfloat16, repeats=1, budget=0)
        rows = runner.make_rows(name, comparison, times, RATES, torch.bfloat16)
        assert [row.contender for row in rows] == list(budget.KINDS)
        assert all(row.median > 0 and row.limit == 0 for row in rows)
        environment = {
            "threads": 1,
            "cpu": "",
            "cores": 1,
            "capability": "",
            "torch": "",
            "kernels": "",
        }
        results = report.Results(
            {**environment, "date": ""},
            {"model": "m", "batch_size": 1, "img_size": 1, "mask_ratio": 0.5},
            1e9,
            {},
            rows,
        )
        assert rows[0].unit in report.table(results) and "| – |" in report.markdown(results)


def test_a_captured_step_begins_where_an_eager_one_does(monkeypatch):
    """With a stand-in for the capture, which runs three steps before it as the real one does."""

    class StandIn:
        def __init__(self, run):
            self.run = run

        def capture(self):
            for _ in range(3):
                self.run()

        def __call__(self):
            return self.run()

    monkeypatch.setattr(models, "CapturedGraph", StandIn)
    pixels, noise = models.images(TINY), TINY.noise()
    eager = models.training_step(models.build(TINY, "packed"), TINY, torch.float32)
    captured = models.CapturedStep(models.build(TINY, "packed"), TINY, torch.float32)
    for _ in range(3):
        assert float(captured(pixels, noise)) == float(eager(pixels, noise))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="inductor had other names"
)
@pytest.mark.thorough
def test_kernels_that_the_compiler_plans():
    """A product, and around it one kernel forward: its GELU and its norm are pointwise or a row."""
    module = nn.Sequential(nn.Linear(16, 32, bias=False), nn.GELU())
    x = torch.empty(8, 16, requires_grad=True)
    ops = fusion.compiled(module, lambda: module(x))
    forward = [(op.kind, op.launches, op.bytes) for op in ops if op.phase == "forward"]
    linear, out = 4 * (8 * 16 + 32 * 16 + 8 * 32), 4 * 8 * 32
    assert forward == [("product", 1, linear), (fusion.AROUND, 1, 2 * out)]
    backward = [op.kind for op in ops if op.phase == "backward"]
    assert sorted(backward) == [fusion.AROUND, "product", "product"]
    fresh = torch.empty(8, 16, requires_grad=True)
    eager = fusion.eager(lambda: nn.functional.gelu(fresh))
    assert [(op.kind, op.bytes) for op in eager if op.phase == "forward"] == [
        (fusion.AROUND, 2 * 4 * 8 * 16)
    ]
    said = fusion.table({"a part": (3, eager, eager, ops)}).splitlines()[-1]
    assert said.startswith(
        "| a part | 3 | 2, 0 MB | 2, 0 MB | 2, 0 MB | 2, 0 MB | 2, 0 MB | 5, 0 MB |"
    )
