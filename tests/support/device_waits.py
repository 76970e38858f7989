"""Counts where a program would wait for its device, without a GPU to wait for."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Ops whose results, or the sizes of whose results, the host has to read.
READ = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_scatter_backward",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class _Calls(TorchFunctionMode):
    """Methods that read memory without an op."""

    def __init__(self, found):
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __init__(self, found):
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if name in READ or self._indexes_by_a_mask(name, args):
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _indexes_by_a_mask(name, args):
        """`x[visible]`: how many elements that are, the host has to know."""
        if name not in ("index", "index_put", "index_put_", "_unsafe_index"):
            return False
        kinds = (torch.bool, torch.uint8)
        return any(index is not None and index.dtype in kinds for index in args[1])


@contextmanager
def device_waits():
    """Yields a list that names, in the end, all that would have waited for a GPU.

    Copies of tensors from the host to the device are not counted: only what the host reads is.
    """
    found = []
    with _Ops(found), _Calls(found):
        yield found
