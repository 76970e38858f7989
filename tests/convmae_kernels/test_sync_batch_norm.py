"""`nn.SyncBatchNorm` on two processes, against batch norm of everything in one."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import convmae_kernels as ck
from convmae_kernels.testing import MASKS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed")
COUNTS = [3, 1]  # images of each process, with different numbers of visible blocks too
DTYPE = torch.float64


def network():
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 4, 1)).to(DTYPE)


def data():
    torch.manual_seed(1)
    return torch.randn(4, 3, 12, 16, dtype=DTYPE), MASKS["ragged"]


def run(model, images, visible):
    """A function of the outputs that adds up over images, backward, and twice."""
    mask = ck.BlockMask.from_visible(visible)
    for _ in range(2):
        y = model(ck.Packed.gather(images, mask)).features
        (y * torch.linspace(-1, 1, 4, dtype=DTYPE)).sin().sum().backward()
    return y.detach()


def process(rank, port, results):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(COUNTS))
    model = ck.nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert type(model[1]) is ck.nn.SyncBatchNorm
    images, visible = data()
    mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    y = run(model, images[mine], visible[mine])
    for p in model.parameters():
        dist.all_reduce(p.grad)
    results[rank] = (y, [p.grad for p in model.parameters()], dict(model.named_buffers()))
    dist.destroy_process_group()


@pytest.mark.thorough
def test_two_processes_are_as_one():
    model = network()
    expected = run(model, *data())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(process, (port, results), nprocs=len(COUNTS))
        outputs, grads, buffers = zip(*(results[rank] for rank in range(len(COUNTS))))
    torch.testing.assert_close(torch.cat(outputs), expected)
    for found, stats in zip(grads, buffers, strict=True):
        torch.testing.assert_close(found, [p.grad for p in model.parameters()])
        torch.testing.assert_close(stats, dict(model.named_buffers()))


def test_conversion_keeps_tensors_and_works_alone():
    model = network()
    plain = copy.deepcopy(model)
    converted = ck.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted[1].weight is model[1].weight
    assert list(converted.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(run(converted, *data()), run(plain, *data()))
    torch.testing.assert_close(converted.state_dict(), plain.state_dict())

    class Other(torch.nn.BatchNorm2d):
        pass

    assert type(ck.nn.SyncBatchNorm.convert_sync_batchnorm(Other(3))) is Other
