"""`Packed` in networks: gradients, autocast, hidden values, concurrency."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convmae_kernels as ck
from convmae_kernels import Packed
from convmae_kernels.testing import random_tensor
from tests.support.packed_maps import INF, MASK, NAN, VISIBLE, B, C, H, W, hide, make_map, pack

layers = pytest.importorskip("timm.layers")
pytestmark = pytest.mark.usefixtures("poisoned_empty")

# -- gradients, autocast, hidden values, concurrency --------------------------------------------


class Net(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(C, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.ln = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.se = layers.SEModule(8, rd_channels=4)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        y = self.fc(self.ln(self.dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = x + self.gamma * self.se(F.gelu(y))
        return x, self.head(F.max_pool2d(x, 3, 2, 1).mean((2, 3)))


def run_net(net, x):
    net.zero_grad()
    y, logits = net(x)
    (y.features.square().sum() + logits.square().sum()).backward()
    return [y.features.detach(), logits.detach(), *(p.grad.clone() for p in net.parameters())]


def test_gradients():
    net = Net().double().eval()  # a network that is dense but for what follows it and for its mean
    mask = ck.BlockMask.full(2, (2, 2))
    images = random_tensor((2, C, 8, 8), torch.float64).requires_grad_()
    found = [*run_net(net, Packed.gather(images, mask)), images.grad.clone()]
    images.grad = None
    net.zero_grad()
    y, logits = net(images)
    (y.square().sum() + logits.square().sum()).backward()
    rows = ck.gather_visible(y.detach(), mask)
    expected = [rows, logits.detach(), *(p.grad for p in net.parameters()), images.grad]
    torch.testing.assert_close(found, expected)


def test_gradients_by_differences():
    mask = ck.BlockMask.from_visible(torch.tensor([[[True, False]], [[False, True]]]))
    net = Net().double()
    images = random_tensor((2, C, 4, 8), torch.float64).requires_grad_()

    def function(images, weight, gamma):
        values = {"dw.weight": weight, "gamma": gamma}
        y, logits = torch.func.functional_call(net, values, (Packed.gather(images, mask),))
        return y.features, logits

    assert torch.autograd.gradcheck(
        function, (images, net.dw.weight, net.gamma), nondet_tol=0, fast_mode=True
    )


def test_autocast():
    net, images = Net().eval(), random_tensor((B, C, H, W))
    exact = run_net(copy.deepcopy(net).double(), pack(images.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert net.stem(pack(images)).dtype == torch.bfloat16
        assert net.dw(net.stem(pack(images))).dtype == torch.bfloat16
        assert net.fc(net.stem(pack(images)).permute(0, 2, 3, 1)).dtype == torch.bfloat16
        found = run_net(copy.deepcopy(net), pack(images))
    for a, b in zip(found, exact):
        assert (a.double() - b).abs().max() <= 0.1 * b.abs().max() + 1e-6
        assert not torch.equal(a.double(), b)


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_hidden_pixels_change_no_bit(value):
    net, images = Net(), make_map(dtype=torch.float32)
    plain = run_net(copy.deepcopy(net), pack(hide(images, 0)))
    other = run_net(copy.deepcopy(net), pack(hide(images, value)))
    assert all(map(torch.equal, plain, other))
    assert all(t.isfinite().all() for t in plain)


def test_gradients_of_hidden_pixels_are_zero():
    images = hide(make_map()).requires_grad_()
    net = Net().double()
    net.bn.eval()
    y, _ = net(pack(images))
    y.features.sum().backward()
    assert not images.grad[~VISIBLE.expand_as(images)].any()
    assert images.grad[VISIBLE.expand_as(images)].any()


def jobs(net):
    generator = torch.Generator().manual_seed(1)
    masks = [MASK, ck.BlockMask.random(B, (3, 4), 0.6, generator), ck.BlockMask.full(B, (3, 4))]
    return [(copy.deepcopy(net), pack(make_map(dtype=torch.float32), mask=m)) for m in masks]


def test_masks_in_turn_do_not_interfere():
    alone = [run_net(*job) for job in jobs(Net().eval())]
    torch.manual_seed(0)
    work = jobs(Net().eval())
    steps = [[job[0].stem(job[1])] for job in work]
    for function in (F.relu, lambda x: x * x.mean((2, 3), keepdim=True), lambda x: x + 1):
        for step in steps:
            step.append(function(step[-1]))
    for step, (net, x) in zip(steps, work):
        y = F.relu(net.stem(x))
        y = y * y.mean((2, 3), keepdim=True) + 1
        assert torch.equal(step[-1].features, y.features)
        assert step[-1].mask is x.mask
    assert all(all(map(torch.equal, run_net(*job), a)) for job, a in zip(work, alone))


def test_threads_do_not_interfere():
    net = Net().eval()
    work = jobs(net)
    alone = [run_net(*job) for job in work]
    found = [[] for _ in work]
    start = threading.Barrier(len(work))

    def run(index):
        start.wait()
        for _ in range(10):
            found[index].append(run_net(*work[index]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(found, alone):
        assert len(results) == 10
        for result in results:
            assert all(map(torch.equal, result, expected))


WRITABLE = {
    "gather": nn.Identity(),
    "product": nn.Conv2d(C, 4, 3, padding=1),
    "windows": nn.Conv2d(C, 4, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(C, C, 3, padding=1, groups=C),
    "pointwise": nn.Conv2d(C, 4, 1),
    "patches": nn.Conv2d(C, 4, 2, 2),
    "transposed": nn.ConvTranspose2d(C, 4, 2, 2),
    "max": nn.MaxPool2d(2),
    "avg": nn.AvgPool2d(2),
    "batch norm": nn.BatchNorm2d(C),
    "group norm": nn.GroupNorm(2, C),
    "upsample": nn.Upsample(scale_factor=2),
}


@pytest.mark.parametrize("name", WRITABLE)
def test_results_may_be_written_into(name):
    """An activation in place after a layer, as VGG has it; autograd refuses some views."""
    results, images = [], make_map()
    for inplace in (False, True):
        layer = copy.deepcopy(WRITABLE[name]).double()
        images = images.detach().requires_grad_()
        y = nn.LeakyReLU(0.1, inplace=inplace)(layer(pack(images)))
        y.features.square().sum().backward()
        results.append([y.features, images.grad, *(p.grad for p in layer.parameters())])
    assert all(map(torch.equal, *results))
