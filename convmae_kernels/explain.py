"""What runs a call, and why: found by running it on tensors without numbers.

So the ops are those that really run, forward and backward, and their order is too; which CUDA
kernel computes one, and how it is cut, the compiled library says itself (csrc/explain.cpp).
"""

from __future__ import annotations

import copy
import functools
import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convmae_kernels import ops
from convmae_kernels.block_mask import BlockMask
from convmae_kernels.explanation import Explanation, Step
from convmae_kernels.ops.masked_conv2d import check_has_kernels
from convmae_kernels.ops.support import choices, dispatch
from convmae_kernels.ops.support.conv_plan import ConvPlan, plan_conv2d
from convmae_kernels.ops.support.geometry import pair
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

Capability = tuple[int, int]
# Shared memory of a multiprocessor, by compute capability (CUDA programming guide); and how many
# multiprocessors a GPU is taken to have of which nothing else is known: an H100's.
SHARED_BYTES = {(7, 5): 65536, (8, 0): 167936, (8, 7): 167936, (9, 0): 233472, (10, 0): 233472}
LEAST_SHARED_BYTES, MULTIPROCESSORS = 102400, 132
# Ops of which a phase reads no more of what it is given than it writes: the visible part.
READS_A_PART = {"gather_visible": "forward", "scatter_visible": "backward"}
# PyTorch's ops that move nothing, besides views, or read nothing.
MOVE_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view")
READ_NOTHING = ("new_zeros", "new_full", "zeros_like", "full_like")
OPS: dict[str, Callable] = {
    op.__name__: op
    for op in (
        ops.masked_conv2d,
        ops.masked_conv_transpose2d,
        ops.gather_visible,
        ops.gather_windows,
        ops.scatter_visible,
    )
}


def explain(
    op: str | Callable,
    *arguments: Any,
    device: str | torch.device | None = None,
    capability: Capability | None = None,
    multiprocessors: int = MULTIPROCESSORS,
    impl: dispatch.Impl = "auto",
    **options: Any,
) -> Explanation:
    """Which kernels run a call, forward and backward, and why; nothing is computed.

    Either with the arguments of the call itself, or with the name of an op and its sizes:

        ck.explain(ck.masked_conv2d, x, weight, bias, mask, stride=2)
        ck.explain("masked_conv2d", side=4, channels=256, kernel=5, groups=256,
                   dtype=torch.bfloat16, device="cuda", capability=(9, 0))

    Args:
        op: a function of this package, a module, or the name of one of `masked_conv2d`,
            `masked_conv_transpose2d`, `gather_visible`, `gather_windows`, `scatter_visible`.
        arguments: those of the call. With none, `options` are sizes: `side`, `channels`, and as far
            as the op has them `kernel` (5), `out_channels` (as `channels`), `groups`, `bias`
            (True) and `halo` (1); `batch` (128), `grid` (14, 14) and `mask_ratio` (0.75) of the
            mask; `dtype` (float32).
        device: where the call would run; the device of the arguments, or the CPU, if None.
        capability: `(major, minor)` of a CUDA GPU that need not be there. The compiled library is
            then taken to have code for it.
        multiprocessors: of such a GPU.
        impl: as in the ops. A name that cannot run the call is refused, as it is there.
        options: the op's other arguments, `stride`, `padding` ...

    Raises:
        ValueError: there is no such op or size, or the call itself would refuse its arguments.
        RuntimeError: `impl` was named and cannot run.
    """
    function = _function(op)
    where = _Place.of(_device(device, capability, arguments), capability, multiprocessors)
    if not arguments:
        arguments, options = _arguments_of_sizes(_name(op, function), options)
    implementations = where.implementations()
    if impl != "auto" and implementations.get(impl, "no: there is none").startswith("no"):
        said = implementations.get(impl, "it is not one of " + ", ".join(implementations))
        raise RuntimeError(f"impl={impl!r} cannot run: {said.removeprefix('no: ')}")
    plan = None
    if function is ops.masked_conv2d:
        plan = _plan(*arguments, **options)
        check_has_kernels(impl, _weight(*arguments, **options), plan)
    if impl == "reference":
        options = {**options, "impl": impl}
    recorder, floors = _record(function, arguments, options, where, impl)
    call = f"{_name(op, function)}({_words(arguments, options)})"
    return Explanation(
        call, where.name, plan, implementations, tuple(recorder.steps), floors, where.notes()
    )


# -- where ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """The device that a call would run on.

    Attributes:
        kind: "cpu", "cuda" or another type of device.
        index: of a GPU that is there; else -1.
        capability: of a CUDA GPU.
    """

    kind: str
    index: int
    capability: Capability | None
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device, capability: Capability | None, count: int) -> _Place:
        if device.type != "cuda":
            if capability is not None:
                raise ValueError(f"capability is of CUDA GPUs, but the device is {device}")
            return cls(device.type, -1, None, 0)
        if capability is not None:
            return cls("cuda", -1, (int(capability[0]), int(capability[1])), count)
        if not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA GPU; name one, e.g. capability=(9, 0)")
        index = torch.cuda.current_device() if device.index is None else device.index
        return cls("cuda", index, torch.cuda.get_device_capability(index), count)

    @property
    def is_there(self) -> bool:
        return self.kind == "cpu" or self.index >= 0

    @property
    def name(self) -> str:
        if self.kind != "cuda":
            return "the CPU" if self.kind == "cpu" else self.kind
        assert self.capability is not None
        number = "compute capability {}.{}".format(*self.capability)
        if self.index >= 0:
            return f"{torch.cuda.get_device_name(self.index)}, {number}"
        return f"a CUDA GPU of {number} with {self.multiprocessors} multiprocessors"

    @property
    def shared_bytes(self) -> int:
        assert self.capability is not None
        major = (self.capability[0], 0)
        default = SHARED_BYTES.get(major, LEAST_SHARED_BYTES) if self.capability[1] == 3 else None
        return SHARED_BYTES.get(self.capability, default or LEAST_SHARED_BYTES)

    def implementations(self) -> dict[str, str]:
        """ "yes" or "no: why" of each implementation."""
        triton = dispatch.WHY_NOT_TRITON
        if self.kind == "cuda":
            cpu: str | None = "the device is a GPU"
            cuda = dispatch.why_not_cuda() if self.index >= 0 else dispatch.WHY_NOT_COMPILED
        else:
            cpu = None if self.kind == "cpu" else f"the device is {self.kind}"
            cpu = cpu or dispatch.WHY_NOT_COMPILED
            cuda = "the device is no CUDA GPU"
            interprets = self.kind == "cpu" and dispatch.TRITON_INTERPRETS
            triton = triton or (None if interprets else "the device is no GPU")
        reasons = {"reference": None, "cpu": cpu, "cuda": cuda, "triton": triton}
        return {name: "yes" if why is None else f"no: {why}" for name, why in reasons.items()}

    def implementation(self, library: str, op: str) -> tuple[str, str]:
        """Whose kernel runs a registered op here, and why; as `dispatch.register` has it."""
        if library == "aten":
            return "pytorch", ""
        if library == "convmae_triton":
            return "triton", "impl='triton' was named, or a measured table chose it"
        there = self.implementations()
        if self.kind == "cpu" and there["cpu"] == "yes" and dispatch.has_kernel(op, "CPU"):
            return "cpu", torch.ops.convmae.cpu_capability()
        if self.kind == "cuda" and there["cuda"] == "yes" and op in dispatch.cuda_ops():
            return "cuda", ""
        if self.kind == "cuda" and there["triton"] == "yes" and op in dispatch.TRITON_OPS:
            why = there["cuda"].removeprefix("no: ")
            return "triton", f"the compiled library has no kernel here ({why})"
        if f"{library}::{op}" in dispatch.COMPOSED:
            return "pytorch", "made of PyTorch's own ops"
        return "reference", "there is no kernel for this op and device"

    def tensor(self, like: Tensor) -> Tensor:
        """One without numbers that lies like another; on the device, or nowhere."""
        device = torch.device(self.kind, self.index) if self.index >= 0 else self.kind
        if not self.is_there:
            device = "meta"
        fresh = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        return fresh.requires_grad_(like.requires_grad)

    def notes(self) -> tuple[str, ...]:
        table = choices.in_use()
        notes = [] if table is None else [f"the measured table {table.where} is in use"]
        if self.kind == "cuda" and self.index < 0 and dispatch.WHY_NOT_COMPILED is None:
            assert self.capability is not None
            if not dispatch.has_code(dispatch.CUDA_ARCHITECTURES, self.capability):
                compiled = dispatch.CUDA_ARCHITECTURES or "no GPU"
                notes.append(
                    f"the compiled library of this installation has code for {compiled}; told is "
                    "what one with code for this GPU would run"
                )
        return tuple(notes)


def _device(device, capability, arguments) -> torch.device:
    if device is not None:
        return torch.device(device)
    if capability is not None:
        return torch.device("cuda")
    tensors = (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))
    return next((t.device for t in tensors), torch.device("cpu"))


# -- the call -------------------------------------------------------------------------------------


def _function(op: str | Callable) -> Callable:
    if callable(op):
        return op
    if op not in OPS:
        raise ValueError(f"there is no op {op!r}, expected one of {', '.join(OPS)}")
    return OPS[op]


def _name(op: str | Callable, function: Callable) -> str:
    return op if isinstance(op, str) else getattr(function, "__name__", type(function).__name__)


def _weight(x, weight, *_: Any, **__: Any) -> Tensor:
    return weight


def _plan(
    x, weight, bias, mask, stride=1, dilation=1, groups=1, *, padding="same", **_: Any
) -> ConvPlan:
    return plan_conv2d(block_side(x.shape[1]), weight.shape, stride, padding, dilation, groups)


def _arguments_of_sizes(
    name: str, options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an op that has these sizes; without numbers.

    Raises:
        ValueError: a size is missing.
    """
    options = dict(options)
    take = options.pop
    side, channels = take("side", None), take("channels", None)
    if name not in OPS or side is None or channels is None:
        raise ValueError(
            f"expected the arguments of the call, or the name of one of {', '.join(OPS)} with "
            "side=... and channels=..."
        )
    dtype, batch, grid = take("dtype", torch.float32), take("batch", 128), take("grid", (14, 14))
    empty = functools.partial(torch.empty, dtype=dtype, device="meta", requires_grad=True)
    noise = torch.empty(batch, grid[0] * grid[1], device="meta")
    mask = BlockMask.from_noise(noise, grid, take("mask_ratio", 0.75))
    x = empty(mask.block_index.shape[0], side * side, channels)
    if name == "gather_visible":
        images = empty(batch, channels, grid[0] * side, grid[1] * side)
        return (images.contiguous(memory_format=torch.channels_last), mask), options
    if name == "scatter_visible":
        return (x, mask), options
    if name == "gather_windows":
        halo = take("halo", 1)
        return (x, mask, (halo,) * 4 if isinstance(halo, int) else halo), options
    kernel, groups = pair("kernel", take("kernel", 5)), options.get("groups", 1)
    outputs = take("out_channels", channels)
    bias = empty(outputs) if take("bias", True) else None
    if name == "masked_conv_transpose2d":
        return (x, empty(channels, outputs // groups, *kernel), bias, mask), options
    return (x, empty(outputs, channels // groups, *kernel), bias, mask), options


def _record(function, arguments, options, where: _Place, impl: str):
    """Runs a call forward, and backward where something has a gradient, on tensors without numbers.

    Returns:
        What was recorded, and by phase the bytes of arguments and results.
    """
    mode: AbstractContextManager = nullcontext()
    if where.is_there:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = (t for t in _floating((arguments, options)) if t.device.type != "meta")
    addresses = [t.data_ptr() % 16 for t in tensors]
    recorder = _Recorder(where, impl, max(addresses, key=lambda a: a % 4, default=0))
    with mode:
        call, parameters = function, []
        if isinstance(function, torch.nn.Module):
            call = copy.deepcopy(function)
            if not where.is_there:
                call = call.to("meta")
            parameters = list(call.parameters())
        given = pytree.tree_map_only(Tensor, where.tensor, (arguments, options))
        features = _floating(given) + parameters
        with recorder:
            outputs = call(*given[0], **given[1])
        results = _floating(outputs)
        floors = {"forward": _floor(function, "forward", features, results)}
        wanted = [t for t in features if t.requires_grad]
        sources = [y for y in results if y.requires_grad]
        if wanted and sources:
            recorder.phase = "backward"
            gradients = [torch.empty_like(y) for y in sources]
            with recorder:
                found = torch.autograd.grad(sources, wanted, gradients, allow_unused=True)
            needed = [t for t in features if any(w is not t and w.dim() > 1 for w in wanted)]
            written = [t for t in found if t is not None]
            read = [*gradients, *(t for t in needed if t.dim() > 1)]
            floors["backward"] = _floor(function, "backward", read, written)
    return recorder, floors


def _floor(function, phase: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    """The bytes that must move: the gradient of a factor needs the other factors."""
    if READS_A_PART.get(getattr(function, "__name__", "")) == phase:
        read = written
    return sum(map(_bytes, read)) + sum(map(_bytes, written))


class _Recorder(TorchDispatchMode):
    """Notes every op that moves something."""

    def __init__(self, where: _Place, impl: str, address: int) -> None:
        super().__init__()
        self.where, self.impl, self.address = where, impl, address
        self.steps: list[Step] = []
        self.phase = "forward"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        library, _, name = func._schema.name.partition("::")
        composed = dispatch.COMPOSED.get(func._schema.name)
        if composed is not None and self.where.implementation(library, name)[0] != "cpu":
            before = len(self.steps)
            try:
                with self:
                    return composed(*args, **kwargs)
            except RuntimeError:  # it looks at numbers: an op as a whole then
                del self.steps[before:]
        out = func(*args, **kwargs)
        moves = not func.is_view and name not in MOVE_NOTHING
        if library in ("aten", "convmae", "convmae_triton") and moves:
            outs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
            if outs:
                self.steps.append(self._step(func, args, kwargs, outs))
        return out

    def _step(self, func, args, kwargs, outs: Sequence[Tensor]) -> Step:
        library, _, name = func._schema.name.partition("::")
        ins = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = sum(map(_bytes, outs))
        read = 0 if name in READ_NOTHING else sum(map(_bytes, ins))
        moved = written + (written if READS_A_PART.get(name) == "forward" else read)
        implementation, reason = self.where.implementation(library, name)
        if self.impl == "triton" and name in dispatch.TRITON_OPS:
            implementation, reason = "triton", "impl='triton' was named"
        kernel, plan = None, {}
        if library == "convmae" and implementation == "cuda" and dispatch.kernels_of(name):
            plan = self._plan(func, args)
            kernel, reason = plan.pop("kernel"), plan.pop("reason")
            moved += 2 * int(plan.get("share_bytes", 0))  # written, and read to be added up
            moved += int(plan.get("more_bytes", 0))
        return Step(self.phase, name, implementation, kernel, reason, plan, moved)

    def _plan(self, func, args) -> dict[str, str]:
        """What the library says of a kernel, by name."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args))
        x = given["x"]
        kernel = given["kernel"] if "kernel" in given else given["weight"].shape[2:]
        said = torch.ops.convmae.explain_kernel(
            func._schema.name.partition("::")[2],
            str(x.dtype).removeprefix("torch."),
            x.shape[0],
            x.shape[2],
            block_side(x.shape[1]),
            [int(k) for k in kernel],
            [int(d) for d in given["dilation"]],
            self.address,
            self.where.index,
            self.where.multiprocessors,
            self.where.shared_bytes,
        )
        return dict(line.split("=", 1) for line in said.splitlines())


# -- words and numbers ----------------------------------------------------------------------------


def _floating(tree: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _bytes(t: Tensor) -> int:
    """Bytes of a tensor; what a dimension repeats counts once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride()):
        elements *= size if stride else 1
    return elements * t.element_size()


def _words(arguments: Iterable[Any], options: dict[str, Any]) -> str:
    """The arguments of a call, tensors as their shapes."""

    def word(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if isinstance(value, BlockMask):
            return f"mask of {value.block_index.shape[0]} blocks"
        return repr(value)

    named = (f"{name}={word(value)}" for name, value in options.items())
    return ", ".join(itertools.chain(map(word, arguments), named))
