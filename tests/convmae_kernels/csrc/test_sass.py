"""The warp of `docs/sass/` that counts instructions: right numbers, and right counts."""

import functools
import re

import numpy as np
import pytest
import torch

from convmae_kernels.ops import reference
from convmae_kernels.ops.support.dispatch import WHY_NOT_COMPILED
from docs import kernel_report, sass, tile_walk

pytestmark = pytest.mark.thorough(but_every=7)  # a sample of long sweeps

COMPILED = WHY_NOT_COMPILED is None
ARCHS = torch.ops.convmae.cuda_architectures().split(", ") if COMPILED else [""]
needs_code_for_sm_90 = pytest.mark.skipif(
    "9.0" not in [arch.removesuffix("+PTX") for arch in ARCHS]
    or kernel_report.find_tool("cuobjdump") is None,
    reason="there are no kernels for sm_90, or no cuobjdump",
)

# out[lane] = lane * (lane + 1) / 2 for lanes below n, 7 for the others: two ways, one with a loop.
TRIANGLE = """
        Function : triangle
        /*0000*/                   S2R R0, SR_TID.X ;          /* 0x0 */
                                                               /* 0x0 */
        /*0010*/                   ULDC UR4, c[0x0][0x218] ;   /* 0x0 */
        /*0020*/                   LDC.64 R2, c[0x0][0x210] ;  /* 0x0 */
        /*0030*/                   BSSY B0, 0xd0 ;             /* 0x0 */
        /*0040*/                   ISETP.GE.AND P0, PT, R0, UR4, PT ;
        /*0050*/                   IMAD.MOV.U32 R4, RZ, RZ, 0x7 ;
        /*0060*/               @P0 BRA 0xc0 ;
        /*0070*/                   CS2R R4, SRZ ;
        /*0080*/                   IADD3 R4, R4, R5, RZ ;
        /*0090*/                   ISETP.LT.AND P1, PT, R5, R0, PT ;
        /*00a0*/                   VIADD R5, R5, 0x1 ;
        /*00b0*/               @P1 BRA 0x80 ;
        /*00c0*/                   BSYNC B0 ;
        /*00d0*/                   IMAD.WIDE.U32 R2, R0, 0x4, R2 ;
        /*00e0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00f0*/                   EXIT ;
"""


def triangle(n):
    code = sass.functions(TRIANGLE)["triangle"]
    memory = np.zeros(4 * 32, np.uint8)
    warp = sass.Warp(code, np.array([sass.MEMORY_BASE, n], np.uint64).tobytes(), memory)
    return warp, warp.run(), memory.view(np.uint32)


@pytest.mark.parametrize("n", [0, 1, 20, 32])
def test_lanes_that_part_and_meet_again(n):
    warp, total, out = triangle(n)
    lanes = np.arange(32)
    assert np.array_equal(out, np.where(lanes < n, lanes * (lanes + 1) // 2, 7))
    # The loop goes on as long as its last lane. Lanes leave it one after another, each to wait at
    # BSYNC, as do the lanes that never entered it; after it all go on together.
    arrivals = n + (n < 32)
    assert warp.count("VIADD") == n
    assert warp.count("BSYNC") == arrivals
    assert [warp.count(kind) for kind in ("STG", "EXIT", "CS2R")] == [1, 1, n > 0]
    assert total == sum(warp.issued) == 10 + arrivals + (1 + 4 * n if n else 0)


def test_what_is_not_known_is_refused():
    code = sass.functions(TRIANGLE.replace("VIADD R5, R5, 0x1", "QUADD R5, R5, 0x1"))["triangle"]
    memory = np.zeros(4 * 32, np.uint8)
    constants = np.array([sass.MEMORY_BASE, 20], np.uint64).tobytes()
    with pytest.raises(sass.UnknownInstruction, match="QUADD"):
        sass.Warp(code, constants, memory).run()
    code = sass.functions(TRIANGLE)["triangle"]
    with pytest.raises(RuntimeError, match="outside of memory"):
        sass.Warp(code, constants, memory[:64]).run()
    with pytest.raises(RuntimeError, match="did not end within 30"):
        sass.Warp(code, constants, memory).run(limit=30)


# -- the kernels as compiled --------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """The code of a kernel, and the warps of its thread blocks, by its name."""
    kernels = {kernel.name: kernel for kernel in kernel_report.kernels() if kernel.arch == "sm_90"}

    @functools.cache
    def find(name):
        symbol = kernels[name].symbol
        text = kernel_report.cuobjdump("-sass", "-arch", "sm_90", "-fun", symbol)
        return sass.functions(text)[symbol], kernels[name].threads // 32

    return find


@pytest.fixture(scope="module")
def walk(compiled):
    """The `Walk` of a kernel by its name; each kernel walks once."""
    return functools.cache(lambda name: tile_walk.Walk(name, *compiled(name)))


KERNELS = [
    f"masked_conv2d{op}_tiles<{shape}>"
    for op in ("", "_weight_grad", "_grads")
    for shape in ("bfloat16, 4, 5", "bfloat16, 2, 5", "half, 2, 3", "float, 4, 7", "float, 2, 7")
] + ["masked_conv2d_tensor<bfloat16>", "masked_conv2d_tensor<half>"]


def positions(tiles_first):
    """Features [tiles, side^2, channels] in the order of packed features, as a tensor."""
    return torch.from_numpy(tiles_first.astype(np.float64))


@needs_code_for_sm_90
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.thorough(but_every=5)
def test_the_machine_code_gives_the_reference(name, compiled):
    """So the walk takes the branches that a GPU takes."""
    shape = tile_walk.Shape.of(name)
    code, warps = compiled(name)
    visible = np.random.default_rng(1).random((9, shape.neighbours)) < 0.5
    problem = tile_walk.Problem(name, visible, warps, reach=9)
    problem.run(code)
    x, table = positions(problem.x), torch.from_numpy(problem.table)
    kernel = [shape.kernel, shape.kernel]
    weight = positions(problem.weight).reshape(shape.channels, 1, *kernel)
    grad = positions(problem.grad)
    rounded = 1e-5 if shape.dtype == "float" else {"bfloat16": 2**-8, "half": 2**-11}[shape.dtype]

    def check(found, expected, tolerance):
        found = torch.from_numpy(found.astype(np.float64))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=50 * 2**-24)

    if shape.op == "":
        y = reference.masked_conv2d(x, weight, positions(problem.bias), table, [1, 1])
        check(problem.output(), y, rounded)
        return
    if shape.op == "_grads":  # the table need not be that of a mask: taps lead back
        grad_x = reference.masked_conv2d(grad, weight.flip(2, 3), None, table, [1, 1])
        check(problem.grad_x(), grad_x, rounded)
        walked, centre = grad, x  # what is summed over windows of which
    else:
        walked, centre = x, grad
    taps, bias = reference.masked_conv2d_weight_grad(centre, walked, table, kernel, [1, 1])
    if shape.op == "_grads":
        taps, bias = taps.flip(2, 3), grad.sum((0, 1))
    check(problem.output(), torch.cat([bias[None], taps.reshape(shape.channels, -1).T]), 1e-5)


def multiply_adds(side, kernel, all_visible):
    """Pairs of an output of a tile and a position that it reads, in the tile or around it."""
    halo, read = kernel // 2, range(-(kernel // 2), side + kernel // 2)
    rows = [(o, i) for o in range(side) for i in read if abs(o - i) <= halo]
    inside = len([i for _, i in rows if 0 <= i < side])
    return len(rows) ** 2 if all_visible else inside**2


@needs_code_for_sm_90
@pytest.mark.parametrize("op", ["", "_weight_grad", "_grads"])
@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", 5), ("float", 7)])
def test_counts_of_multiply_adds(dtype, kernel, op, walk):
    name = f"masked_conv2d{op}_tiles<{dtype}, 4, {kernel}>"
    channels = 2 if dtype == "bfloat16" else 1  # of a lane
    channels *= 2 if op == "_grads" else 1  # for the gradients of x and of the taps
    counts = walk(name).count("FFMA")
    assert counts.alone == channels * multiply_adds(4, kernel, False)
    assert counts.all == channels * multiply_adds(4, kernel, True)
    assert counts.once == 0
    assert counts.expected(0.5) == (counts.alone + counts.all) / 2


@needs_code_for_sm_90
def test_one_wide_store_and_one_wide_copy_for_four_positions(walk):
    name = "masked_conv2d_tiles<bfloat16, 4, 5>"
    assert walk(name).count("STG") == (4, 4, 0)
    copies = walk(name).count("LDGSTS")
    around = (4 * (2 * 2) + 4 * (2 * 4) + 16) / 4
    assert (copies.alone, copies.all) == (16 / 4, around)
    # The weights, 64 channels x 25 taps x 2 bytes: seven copies of 32 lanes.
    assert copies.once == 7


@needs_code_for_sm_90
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("masked_conv2d_tiles<bfloat16, 4, 5>", 800),
        ("masked_conv2d_tiles<bfloat16, 2, 5>", 235),
        ("masked_conv2d_grads_tiles<bfloat16, 4, 5>", 1350),
        ("masked_conv2d_grads_tiles<bfloat16, 2, 5>", 420),
    ],
)
def test_instructions_of_an_expected_tile(name, most, walk):
    """With a quarter of the neighbours visible: what leaves most of the copy rate possible."""
    assert walk(name).count().expected(0.25) <= most


@needs_code_for_sm_90
@pytest.mark.thorough
def test_tensor_cores_take_less_than_half_of_the_instructions(compiled):
    names = "masked_conv2d_tiles<bfloat16, 4, 7>", "masked_conv2d_tensor<bfloat16>"
    walks = (tile_walk.walk(name, *compiled(name)) for name in names)
    tiles, tensor = (walk.count().expected(0.4) for walk in walks)
    assert tensor < tiles / 2


@needs_code_for_sm_90
def test_the_generated_page_has_every_kernel():
    page = (kernel_report.ROOT / "docs" / "generated" / "kernels.md").read_text()
    compiled, walked, *_ = page.split("## ")
    kernels = [kernel for kernel in kernel_report.kernels() if kernel.arch == "sm_90"]
    tiled = {kernel.name for kernel in kernels if kernel.is_specialised}
    assert set(re.findall("^[|] `(.*?)`", compiled, re.M)) == {kernel.name for kernel in kernels}
    assert set(re.findall("^[|] `(.*?)`", walked, re.M)) == tiled


@needs_code_for_sm_90
@pytest.mark.parametrize("name", KERNELS[:15:5])
def test_nothing_waits_for_the_table_while_a_tile_is_computed(name, walk):
    """What the load of a table entry brings is used after the tile: a warp would wait for it."""
    code = walk(name).each_tile
    (load,) = (i for i, instruction in enumerate(code) if instruction.name.startswith("LDG.E"))
    last = max(i for i, instruction in enumerate(code) if instruction.kind == "FFMA")
    assert load < last
    register = re.compile(rf"\b{code[load].operands[0]}\b")
    for instruction in code[load + 1 : last]:
        assert not any(register.search(operand) for operand in instruction.operands), instruction


def test_predicted_and_measured_shares():
    name = "masked_conv2d_weight_grad_tiles<bfloat16, 4, 5>"
    tile = kernel_report.Tile(name, 1000, 3000, 2000, 100, 10)
    card = kernel_report.Card("a card", copy=4e12, multiprocessors=100, hertz=2e9)
    # 4,096 bytes of a tile read and written: 819.2 instructions, of the 2,000 that it takes.
    row = {"batch": 128, "dtype": "bfloat16", "implementation": "cuda", "us": 1.0}
    row |= {"of_copy": 0.256, "in_cache": False}
    rows = [
        row | {"kernel": "weight_gradient", "shape": "side8/24/5x5"},
        row | {"kernel": "weight_gradient", "shape": "side1/24/5x5"},
        row | {"kernel": "gather", "shape": "side16/3", "in_cache": True},
    ]
    content = {"kernels": {"all": {"rows": rows}, "bad": {"failed": "it hangs"}}}
    lines = kernel_report.measured_table([tile], card, content).splitlines()
    assert lines[2:] == [
        f"| `weight_gradient side8/24/5x5` | bfloat16 | `{name}` | 41 % | 26 % |",
        "| `weight_gradient side1/24/5x5` | bfloat16 | – | – | 26 % |",
        "| `gather side16/3*` | bfloat16 | – | – | 26 % |",
    ]
    assert kernel_report.tiled_kernel("forward", "side2/8/7x7", "float32") == (
        "masked_conv2d_tiles<float, 2, 7>"
    )
    assert kernel_report.tiled_kernel("forward", "side4/8/1x7", "float32") is None


def test_what_copy_speed_allows():
    card = kernel_report.Card("a card", copy=4e12, multiprocessors=100, hertz=2e9)
    # 4,000 bytes of a multiprocessor's 40 GB/s take 100 ns: 200 cycles of 4 instructions.
    assert card.instructions(4000) == pytest.approx(800)
