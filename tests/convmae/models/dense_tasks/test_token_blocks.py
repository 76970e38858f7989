"""Attention with relative positions, global and in windows, against loops over its definition."""

import pytest
import torch
import torch.nn.functional as F

from convmae.models.dense_tasks.positions import (
    RelativePositionTable,
    relative_position_index,
    resample_distances,
    resample_table,
    table_bias,
)
from convmae.models.dense_tasks.token_blocks import (
    DecomposedAttention,
    MapAttention,
    MapBlock,
    TableAttention,
    cut_windows,
    in_windows,
    join_windows,
)

DIM, HEADS = 8, 2
GRID = (3, 5)
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def drawn(module):
    """In float64, with numbers in all parameters, tables too."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module


def loop_attention(attn, x, bias_of, seen):
    """`[N, gh, gw, dim]`, one query and one head at a time.

    `bias_of(head, q, query, key)` is added to a logit; `seen(query)` are the keys of a query, each
    a place on the map, or None for a token that is all zeros.
    """
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).split(DIM, dim=3)
    _, k0, v0 = attn.qkv.bias.split(DIM)
    d = DIM // HEADS
    images = []
    for n in range(x.shape[0]):
        rows = []
        for r in range(x.shape[1]):
            for c in range(x.shape[2]):
                parts = []
                for h in range(HEADS):
                    cut = slice(h * d, (h + 1) * d)
                    query = q[n, r, c, cut]
                    logits, values = [], []
                    for place, real in seen((r, c)):
                        key = k[n][place][cut] if real else k0[cut]
                        values.append(v[n][place][cut] if real else v0[cut])
                        logits.append(query @ key * d**-0.5 + bias_of(h, query, (r, c), place))
                    weights = torch.stack(logits).softmax(0)
                    parts.append(weights @ torch.stack(values))
                rows.append(torch.cat(parts))
        images.append(torch.stack(rows).unflatten(0, x.shape[1:3]))
    return F.linear(torch.stack(images), attn.proj.weight, attn.proj.bias)


def everywhere(grid):
    return lambda query: [((r, c), True) for r in range(grid[0]) for c in range(grid[1])]


def within(window, grid, padding_counts):
    """The keys in the window of a query; those outside the map are zeros, or none."""

    def seen(query):
        first = [place // side * side for place, side in zip(query, window)]
        places = [(first[0] + r, first[1] + c) for r in range(window[0]) for c in range(window[1])]
        inside = [(p, p[0] < grid[0] and p[1] < grid[1]) for p in places]
        return [(p, real) for p, real in inside if real or padding_counts]

    return seen


def of_table(table, grid):
    """The official index into a table of `grid`."""

    def bias(head, q, query, key):
        down, right = query[0] - key[0] + grid[0] - 1, query[1] - key[1] + grid[1] - 1
        return table[down * (2 * grid[1] - 1) + right, head]

    return bias


def of_vectors(attn, grid):
    """Decomposed positions, by queries that are not scaled."""
    rows = resample_distances(attn.rel_pos_h, 2 * grid[0] - 1)
    columns = resample_distances(attn.rel_pos_w, 2 * grid[1] - 1)

    def bias(head, q, query, key):
        down, right = query[0] - key[0] + grid[0] - 1, query[1] - key[1] + grid[1] - 1
        return q @ rows[down] + q @ columns[right]

    return bias


def assert_same(found, expected, x, parameters):
    """Values, and the gradients of a random sum of them."""
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.randn_like(found)
    inputs = [x, *parameters]
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    for mine, theirs in zip(ours, torch.autograd.grad((expected * weight).sum(), inputs)):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_attention_with_a_table():
    attn = drawn(TableAttention(DIM, HEADS, GRID))
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64, requires_grad=True)
    bias = of_table(attn.relative_position_bias_table, GRID)
    expected = loop_attention(attn, x, bias, everywhere(GRID))
    assert_same(attn(x), expected, x, attn.parameters())


@pytest.mark.parametrize("made_for", [GRID, (5, 4)], ids=["own grid", "another grid"])
def test_attention_with_decomposed_positions(made_for):
    attn = drawn(DecomposedAttention(DIM, HEADS, made_for))
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64, requires_grad=True)
    expected = loop_attention(attn, x, of_vectors(attn, GRID), everywhere(GRID))
    assert_same(attn(x), expected, x, attn.parameters())


def test_windows_without_padding_in_the_attention():
    """As in the detector with shared tables, on a grid that the windows do not divide."""
    attn, window = drawn(MapAttention(DIM, HEADS)), (2, 2)
    table = drawn(RelativePositionTable(window, HEADS))
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64, requires_grad=True)
    parameters = [*attn.parameters(), *table.parameters()]
    found = in_windows(attn, x, window, table.window(window))
    bias = of_table(table.relative_position_bias_table, window)
    expected = loop_attention(attn, x, bias, within(window, GRID, padding_counts=False))
    assert_same(found, expected, x, parameters)


def test_windows_with_padding_in_the_attention():
    """As in ViTDet: zeros behind the LayerNorm, whose keys and values are the biases of `qkv`."""
    window = (2, 2)
    attn = drawn(DecomposedAttention(DIM, HEADS, window))
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64, requires_grad=True)
    found = in_windows(attn, x, window, padding_counts=True)
    expected = loop_attention(
        attn, x, of_vectors(attn, window), within(window, GRID, padding_counts=True)
    )
    assert_same(found, expected, x, attn.parameters())


@pytest.mark.parametrize("padding_counts", [False, True])
def test_a_window_as_large_as_the_map_is_global_attention(padding_counts):
    attn = drawn(TableAttention(DIM, HEADS, GRID))
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64)
    torch.testing.assert_close(in_windows(attn, x, GRID, None, padding_counts), attn(x), **CLOSE)


def test_windows_larger_than_the_map():
    """They see the map; the middle of their table has the distances that occur in it."""
    large = RelativePositionTable((6, 7), HEADS)
    small = RelativePositionTable(GRID, HEADS)
    drawn(large)
    assert torch.equal(large.window((6, 7)), large((6, 7)))
    with torch.no_grad():
        middle = large.relative_position_bias_table.view(11, 13, HEADS)[3:8, 2:11]
        small.double().relative_position_bias_table.copy_(middle.flatten(0, 1))
    assert torch.equal(large.window(GRID), small(GRID))
    block = drawn(MapBlock(MapAttention(DIM, HEADS), DIM, 2, 0.0, 1e-6, window=(6, 7)))
    whole = drawn(MapBlock(MapAttention(DIM, HEADS), DIM, 2, 0.0, 1e-6))
    whole.load_state_dict(block.state_dict())
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64)
    bias = large.window(block.window_of(x))
    torch.testing.assert_close(block(x, bias), whole(x, small(GRID)), **CLOSE)


def test_bias_is_the_table_at_the_official_index():
    table = torch.randn((2 * 3 - 1) * (2 * 5 - 1), HEADS)
    index = relative_position_index(GRID)
    assert torch.equal(table_bias(table, GRID)[0], table[index].permute(2, 0, 1))
    assert index[0, 0] == 2 * 9 + 4 and index[0, -1] == 0 and index[-1, 0] == 44


def test_tables_of_other_grids():
    table = torch.randn(25, HEADS)
    assert resample_table(table, (3, 3), (3, 3)) is table
    image = table.t().view(1, HEADS, 5, 5)
    expected = F.interpolate(image, size=(3, 9), mode="bicubic", align_corners=False)
    found = resample_table(table, (3, 3), (2, 5))
    assert torch.equal(found, expected[0].flatten(1).t())
    vectors = torch.tensor([[0.0], [1.0], [2.0]])
    assert resample_distances(vectors, 3) is vectors
    five = torch.tensor([[0.0], [0.4], [1.0], [1.6], [2.0]])
    torch.testing.assert_close(resample_distances(vectors, 5), five)


def test_windows_are_cut_in_raster_order():
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = cut_windows(x, (2, 3))
    assert windows.shape == (8, 2, 3, 1)
    assert torch.equal(windows[1, :, :, 0], x[0, :2, 3:, 0])
    assert torch.equal(windows[6, :, :, 0], x[1, 2:, :3, 0])
    assert torch.equal(join_windows(windows, (2, 2)), x)


def test_scales_of_the_branches():
    block = drawn(MapBlock(MapAttention(DIM, HEADS), DIM, 2, 0.0, 1e-5, layer_scale=True))
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64)
    y = x + block.gamma_1 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + block.gamma_2 * block.mlp(block.norm2(y)), **CLOSE)
    assert {block.norm1.eps, block.norm2.eps} == {1e-5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype):
    """The bias is rounded as the logits are; padding stays out."""
    attn = MapAttention(DIM, HEADS)
    table = RelativePositionTable((2, 2), HEADS)
    torch.nn.init.normal_(table.relative_position_bias_table)
    x = torch.randn(2, *GRID, DIM)
    bias = table.window((2, 2)).detach()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        found = in_windows(attn, x, (2, 2), bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), in_windows(attn, x, (2, 2), bias), rtol=0, atol=0.02)
