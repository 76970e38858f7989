"""What sums are accumulated in, and in which order they are added up."""

import torch
import triton
import triton.language as tl


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """float64 for float64, float32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def pairwise_sum(x, OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr):
    """`[OUTER, LANES, INNER] -> [OUTER, INNER]`: sums of two neighbours, then of two of these, ...

    `tl.sum` of more than two terms adds them in an order that the number of warps decides.
    """
    if LANES == 1:
        return tl.reshape(x, (OUTER, INNER))
    else:
        pairs = tl.sum(tl.reshape(x, (OUTER, LANES // 2, 2, INNER)), axis=2)
        return pairwise_sum(pairs, OUTER, LANES // 2, INNER)


def parts_of(rows: int, least: int, most: int) -> tuple[int, int]:
    """How many rows are summed by one program, `least` or more, and how many such parts there are.

    That follows from the problem alone, so no sum depends on the configuration.
    """
    per_part = max(least, -(-rows // most))
    return per_part, -(-rows // per_part)


def empty_parts(x: torch.Tensor, parts: int, vectors: int) -> torch.Tensor:
    """Room for the sums over the rows of each part: `[parts, vectors, C]` of `x`, `[rows, C]`."""
    dtype = torch.float64 if accumulator(x.dtype) == tl.float64 else torch.float32
    return x.new_empty(parts, vectors, x.shape[1], dtype=dtype)


@triton.jit
def sum_of_parts(
    parts_ptr,  # [parts, elements]
    element,  # [ELEMENTS]: which ones; those behind the end are 0
    parts,
    elements,
    ACCUMULATOR: tl.constexpr,
    LANES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """`[ELEMENTS]`: their sums over all parts, always in the same order."""
    sums = tl.zeros([LANES, ELEMENTS], ACCUMULATOR)
    for start in range(0, parts, LANES):
        part = start + tl.arange(0, LANES)
        sums += tl.load(
            parts_ptr + part.to(tl.int64)[:, None] * elements + element[None, :],
            mask=(part < parts)[:, None] & (element < elements)[None, :],
            other=0,
        )
    return tl.reshape(pairwise_sum(sums, 1, LANES, ELEMENTS), (ELEMENTS,))


PART_LANES, ELEMENTS = 32, 32  # the tile in which the kernels below add up parts


@triton.jit(do_not_specialize=["parts"])
def add_parts_kernel(
    parts_ptr,  # [parts, VECTORS, C]
    first_ptr,  # [C]
    second_ptr,  # [C]; any pointer where VECTORS is 1
    third_ptr,  # [C]; any pointer where VECTORS is less than 3
    parts,
    channels,
    VECTORS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LANES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    elements = VECTORS * channels
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = sum_of_parts(parts_ptr, element, parts, elements, ACCUMULATOR, LANES, ELEMENTS)
    total = total.to(first_ptr.dtype.element_ty)
    vector, channel = element // channels, element % channels
    tl.store(first_ptr + channel, total, mask=vector == 0)
    if VECTORS > 1:
        tl.store(second_ptr + channel, total, mask=vector == 1)
    if VECTORS > 2:
        tl.store(third_ptr + channel, total, mask=vector == 2)


def add_parts(sums: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """`[parts, vectors, C]` to as many vectors `[C]`, each added up in a fixed order; at most 3."""
    parts, vectors, channels = sums.shape
    results = [sums.new_empty(channels, dtype=dtype) for _ in range(vectors)]
    if channels > 0:
        pointers = (results * 3)[:3]
        add_parts_kernel[(-(-vectors * channels // ELEMENTS),)](
            sums,
            *pointers,
            parts,
            channels,
            VECTORS=vectors,
            ACCUMULATOR=accumulator(sums.dtype),
            LANES=PART_LANES,
            ELEMENTS=ELEMENTS,
        )
    return results
