"""The emulator of `tests/simt` itself: what it promises, and that it finds what is wrong."""

import math

import numpy as np
import pytest
from simt.emulator import EmulatorError, Removed, build, module, translate, why_not, without

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no emulator: {why_not()}"),
    pytest.mark.thorough(but_every=7),
]

SEEDS = range(8)  # seed 0: ascending, 1: descending, even: random, odd: random and interrupted
NOTHING = np.zeros(0, np.int32)


def launch(
    kernel, shape, x=NOTHING, *, grid=1, block=32, shared=0, seed=0, n=0, checker="address",
    removed=None,
):  # fmt: skip
    emulator = module("selftest", checker, removed)
    grid, block = ([*size] if isinstance(size, tuple) else [size, 1, 1] for size in (grid, block))
    count = math.prod(shape) * x.itemsize
    out = emulator.call("launch", kernel, grid, block, shared, seed, x, count, n)
    return np.frombuffer(out, x.dtype).reshape(shape)


def check_sum(**options):
    x = np.random.default_rng(0).integers(-9, 9, (3, 256)).astype(np.float32)
    sums = launch("block_sum", (3,), x, grid=3, block=256, **options)
    assert np.array_equal(sums, x.sum(1)), f"wrong sums, {options}"


all_checkers = pytest.mark.parametrize("checker", ["address", "races"])
all_seeds = pytest.mark.parametrize("seed", SEEDS)


# -- what it promises ---------------------------------------------------------------------------


@all_seeds
def test_ids(seed):
    out = launch("ids", (12, 64), grid=(3, 2, 2), block=(8, 4, 2), seed=seed)
    assert np.array_equal(out, np.arange(12)[:, None] * 1000 + np.arange(64))


@all_seeds
@all_checkers
def test_barriers(checker, seed):
    check_sum(checker=checker, seed=seed)


@all_seeds
@all_checkers
@pytest.mark.parametrize("threads", [1, 33, 100])
def test_dynamic_shared_memory(checker, seed, threads):
    x = np.random.default_rng(0).normal(size=(4, threads)).astype(np.float32)
    out = launch(
        "reverse", x.shape, x, grid=4, block=threads, shared=4 * threads, seed=seed, checker=checker
    )
    assert np.array_equal(out, x[:, ::-1])


@all_seeds
@all_checkers
def test_asynchronous_copies(checker, seed):
    x = np.arange(256, dtype=np.int32)
    out = launch("reverse_copies", (256,), x, block=64, seed=seed, checker=checker)
    assert np.array_equal(out, x[::-1])


def test_shared_memory_is_poisoned_before_every_block():
    assert np.isnan(launch("uninitialised", (3, 32), NOTHING.astype(np.float32), grid=3)).all()


@all_seeds
@pytest.mark.parametrize("width", [8, 16, 32])
def test_shuffles_and_votes(seed, width):
    x = np.random.default_rng(0).integers(0, 100, 64).astype(np.int32)
    lane = np.arange(64)
    first = lane // width * width

    def read(source):  # a lane outside of its group reads itself
        return x[np.where((source >= first) & (source < first + width), source, lane)]

    odd = (x.reshape(2, 32) % 2).astype(np.uint64)
    ballots = (odd << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32).view(np.int32)
    any_seven = (x.reshape(2, 32) == 7).any(1)
    rows = [read(first + 3), read(lane - 2), read(lane + 5), read(lane ^ 6)]
    rows += [row.repeat(32) for row in (ballots, any_seven, np.ones(2))]
    out = launch("warp_calls", (7, 64), x, block=64, seed=seed, n=width)
    assert np.array_equal(out, np.array(rows))


@all_seeds
def test_shuffles_of_half_a_warp(seed):
    x = np.random.default_rng(0).integers(0, 100, 64).astype(np.int32)
    out = launch("half_warps", (64,), x, block=64, seed=seed)
    assert np.array_equal(out, x.reshape(4, 16).cumsum(1).ravel())


@all_seeds
@all_checkers
def test_syncwarp(checker, seed):
    x = np.arange(64, dtype=np.int32)
    out = launch("warp_exchange", (64,), x, block=64, seed=seed, checker=checker)
    assert np.array_equal(out, x ^ 1)


@all_seeds
def test_counting_barriers(seed):
    for x in (np.arange(64) % 3, np.zeros(64), np.ones(64)):
        out = launch("counts", (64, 3), x.astype(np.int32), block=64, seed=seed)
        assert (out == [(x != 0).sum(), (x != 0).any(), (x != 0).all()]).all()


@all_seeds
@all_checkers
def test_threads_that_return_count_for_no_barrier(checker, seed):
    out = launch("early_exit", (64,), block=64, seed=seed, checker=checker)
    even = np.arange(0, 64, 2)
    assert np.array_equal(out[::2], (even + 2) % 64)
    assert (out[1::2] == -1).all()  # the poison


# -- what it finds ------------------------------------------------------------------------------


def fails(kernel, shape, message, **options):
    with pytest.raises(EmulatorError, match=message):
        launch(kernel, shape, **options)
    check_sum(seed=0)  # the emulator goes on


@all_seeds
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "divergent_barrier",
            r"block \(0, 0, 0\): thread \(\d+, 0, 0\) is the last at a divergent barrier: thread "
            r"\(0, 0, 0\) waits in __syncthreads at line \d+, but thread \(16, 0, 0\) waits",
        ),
        (
            "barrier_against_shuffle",
            r"block \(0, 0, 0\): 32 of 32 threads wait for ever: thread \(0, 0, 0\) waits in "
            r"__shfl_xor_sync at line \d+; thread \(5, 0, 0\) waits in __syncthreads",
        ),
        (
            "mask_without_caller",
            r"thread \(\d+, 0, 0\) __shfl_sync with a mask that lacks the call",
        ),
        ("empty_mask", "__ballot_sync with a mask that lacks the calling lane"),
        (
            "shuffle_from_outside_the_mask",
            r"thread \(0, 0, 0\) waits in __shfl_sync at line \d+ and reads lane 20, which",
        ),
    ],
)
def test_reports(kernel, message, seed):
    fails(kernel, (32,), message, seed=seed)


@pytest.mark.parametrize(
    ("kernel", "shape", "message", "options"),
    [
        ("past_the_output", (20,), r"(?s)heap-buffer-overflow.*WRITE of size 4.*cuh", {"n": 20}),
        ("past_shared_memory", (32,), r"(?s)heap-buffer-overflow.*WRITE of size 4.*cuh", {}),
        (
            "past_dynamic_shared_memory",
            (32,),
            r"(?s)heap-buffer-overflow.*READ of size 4.*cuh",
            {"shared": 128},
        ),
        (
            "reverse_copies",
            (256,),
            r"(?s)heap-buffer-overflow.*READ of size 16",
            {"x": np.zeros(255, np.int32), "block": 64},
        ),
        ("misaligned_vector", (129,), "misaligned address .* requires 16 byte alignment", {}),
    ],
)
def test_sanitizers_report(kernel, shape, message, options):
    fails(kernel, shape, message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, r"a grid of \(0, 1, 1\) cannot be launched"),
        ({"grid": (1, 65536, 1)}, r"a grid of \(1, 65536, 1\) cannot"),
        ({"block": 1025}, r"blocks of \(1025, 1, 1\) threads cannot"),
        ({"block": (32, 2, 64)}, r"blocks of \(32, 2, 64\) threads cannot"),
        ({"shared": 101377}, "101377 bytes of shared memory are too many"),
    ],
)
def test_limits_of_a_launch(options, message):
    fails("ids", (1,), message, **options)


def test_two_thread_blocks_that_write_the_same_bytes():
    message = r"writes byte \d+ of an array of 128 bytes, which thread block \d has written"
    fails("same_bytes", (32,), message, grid=2, checker="races")
    assert (launch("same_bytes", (32,), checker="races") == 1).all()


# Those of block_sum, each taken out of a copy of the source.
BARRIERS = {
    name: Removed("selftest.cpp", "selftest.cuh", "__syncthreads();", occurrence)
    for occurrence, name in enumerate(("before the loop", "in the loop"))
}


@pytest.mark.parametrize("removed", BARRIERS.values(), ids=BARRIERS)
def test_a_removed_barrier_gives_wrong_results(removed):
    wrong = 0
    for seed in SEEDS:
        try:
            check_sum(seed=seed, removed=removed)
        except AssertionError:
            wrong += 1
    assert wrong > 0


@all_seeds
@pytest.mark.parametrize("removed", BARRIERS.values(), ids=BARRIERS)
def test_a_removed_barrier_is_a_race_under_every_seed(removed, seed):
    message = (
        r"thread \(\d+, 0, 0\) (reads|writes) shared memory that thread \(\d+, 0, 0\) (wrote|read)"
    )
    with pytest.raises(EmulatorError, match=message):
        check_sum(seed=seed, checker="races", removed=removed)


def test_a_removed_wait_for_copies_gives_wrong_results():
    removed = Removed("selftest.cpp", "selftest.cuh", "__pipeline_wait_prior(0);", 0)
    x = np.arange(256, dtype=np.int32)
    out = launch("reverse_copies", (256,), x, block=64, seed=0, removed=removed)
    assert not np.array_equal(out, x[::-1])


# -- the build ----------------------------------------------------------------------------------


def test_shared_memory_is_translated():
    source = (
        "__shared__ T a[2][N];\nextern __shared__ __align__(16) char b[];\n__shared__ P<T, 3> c;"
    )
    assert translate(source).splitlines() == [
        "SIMT_SHARED(a, T[2][N]);",
        "SIMT_DYNAMIC_SHARED(char, b);",
        "SIMT_SHARED(c, P<T, 3>);",
    ]
    with pytest.raises(ValueError, match="cannot translate .*: __shared__ int a, b;"):
        translate("__shared__ int a, b;")


def test_statements_are_taken_out_one_at_a_time():
    assert without("a; b; a;", "a;", 1) == "a; b; ;"
    with pytest.raises(ValueError, match="a; occurs 2 times only"):
        without("a; b; a;", "a;", 2)


def test_a_second_build_compiles_nothing():
    library = build("selftest")
    before = library.stat().st_mtime_ns
    assert build("selftest").stat().st_mtime_ns == before
