"""`BlockMask` and its neighbour table."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

import convmae_kernels as ck
from convmae_kernels.testing import MASKS, make_mask
from convmae_kernels.zorder import BLOCK_SIZES

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def same(a, b):
    """Two masks of the same content, the private table included."""
    leaves = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    counts = a.visible_per_image == b.visible_per_image
    return counts and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in leaves)


# -- constructors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "ratio", "keep"),
    [
        (196, 0.75, 49),
        (196, 0.6, 78),
        (196, 0.0, 196),
        (196, 0.999, 0),
        (49, 0.75, 12),
        (1, 0.5, 0),
        (1, 0.0, 1),
        (30, 0.9, 2),  # 30 * (1 - 0.9) is 2.9999999999999996
        (10, 0.7, 3),  # 10 * (1 - 0.7) is 3.0000000000000004
        (10, 0.9, 0),  # 10 * (1 - 0.9) is 0.9999999999999998: MAE's rule, to the letter
    ],
)
def test_number_of_visible_blocks_is_that_of_mae(length, ratio, keep):
    for mask in (
        ck.BlockMask.random(3, (1, length), ratio),
        ck.BlockMask.from_noise(torch.rand(3, length), (1, length), ratio),
    ):
        assert mask.visible.flatten(1).sum(1).tolist() == [keep] * 3
        assert mask.visible_per_image == keep
        assert mask.num_visible == 3 * keep
        assert mask.density == pytest.approx(keep / length)


def test_random_follows_the_generator():
    a, b, other = (
        ck.BlockMask.random(2, (14, 14), 0.75, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert same(a, b)
    assert not torch.equal(a.visible, other.visible)
    assert not torch.equal(a.visible[0], a.visible[1])
    torch.manual_seed(5)
    default = ck.BlockMask.random(2, (14, 14), mask_ratio=0.75)
    torch.manual_seed(5)
    assert same(default, ck.BlockMask.random(2, (14, 14), mask_ratio=0.75))


def test_random_on_a_device():
    assert ck.BlockMask.random(2, (3, 4), 0.5, device="meta").visible.device.type == "meta"
    assert ck.BlockMask.full(2, (3, 4), device="meta").block_index.device.type == "meta"


def test_from_noise_keeps_the_smallest_and_of_equals_the_first():
    noise = torch.tensor([[0.3, 0.1, 0.2, 0.9, 0.8, 0.0], [0.5, 0.5, 0.1, 0.5, 0.5, 0.5]])
    mask = ck.BlockMask.from_noise(noise, (2, 3), 0.5)
    expected = [[[0, 1, 1], [0, 0, 1]], [[1, 1, 1], [0, 0, 0]]]
    assert mask.visible.int().tolist() == expected
    assert mask.block_index.tolist() == [1, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_noise_with_many_ties(dtype):
    noise = torch.randint(0, 3, (4, 196)).to(dtype)
    mask = ck.BlockMask.from_noise(noise, (14, 14), 0.75)
    for image, values in enumerate(noise.tolist()):
        kept = sorted(range(196), key=lambda block: (values[block], block))[:49]
        assert mask.visible[image].flatten().nonzero().flatten().tolist() == sorted(kept)


@pytest.mark.parametrize("name", MASKS)
def test_from_visible(name):
    mask = make_mask(name)
    flat = [i for i, v in enumerate(MASKS[name].flatten().tolist()) if v]
    counts = set(MASKS[name].flatten(1).sum(1).tolist())
    assert torch.equal(mask.visible, MASKS[name])
    assert mask.block_index.dtype == torch.int64
    assert mask.block_index.tolist() == flat
    assert mask.num_visible == len(flat)
    assert mask.visible_per_image == (counts.pop() if len(counts) == 1 else None)


def test_constructors_agree():
    noise = torch.rand(3, 12)
    mask = ck.BlockMask.from_noise(noise, (3, 4), 0.7)
    assert same(mask, ck.BlockMask.from_visible(mask.visible))
    assert same(ck.BlockMask.full(2, (3, 4)), make_mask("all"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_from_ids_in_any_order(dtype):
    ids = torch.tensor([[5, 0, 11], [1, 3, 2]], dtype=dtype)
    mask = ck.BlockMask.from_ids(ids, (3, 4))
    visible = torch.zeros(2, 12, dtype=torch.bool)
    for image, places in enumerate(ids.tolist()):
        visible[image, places] = True
    assert same(mask, ck.BlockMask.from_visible(visible.view(2, 3, 4)))
    assert same(mask, ck.BlockMask.from_ids(ids, (3, 4), check=False))
    assert mask.visible_per_image == 3


def test_from_ids_of_no_images_or_blocks():
    for shape in ((0, 5), (2, 0)):
        mask = ck.BlockMask.from_ids(torch.zeros(shape, dtype=torch.int64), (3, 4))
        assert (mask.batch_size, mask.num_visible) == (shape[0], 0)


def test_from_ids_in_compiled_code():
    def model(noise):
        return ck.BlockMask.from_ids(noise.argsort(dim=1)[:, :5], (3, 4)).block_index

    torch._dynamo.reset()
    noise = torch.rand(3, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(noise), model(noise))


def test_masks_do_not_share_memory_with_their_arguments():
    visible, noise = MASKS["ragged"].clone(), torch.rand(2, 12)
    mask, other = (
        ck.BlockMask.from_visible(visible),
        ck.BlockMask.from_noise(noise, (3, 4), 0.5),
    )
    before = copy.deepcopy(other)
    visible.logical_not_()
    noise.neg_()
    assert same(mask, make_mask("ragged"))
    assert same(other, before)


def test_a_batch_of_no_images():
    for mask in (
        ck.BlockMask.random(0, (3, 4), 0.5),
        ck.BlockMask.from_visible(torch.ones(0, 3, 4, dtype=torch.bool)),
        ck.BlockMask.full(0, (3, 4)),
    ):
        assert (mask.batch_size, mask.num_blocks, mask.num_visible, mask.density) == (0, 0, 0, 0.0)
        assert mask.neighbours().shape == (0, 9)


# -- facts --------------------------------------------------------------------------------------


def test_facts():
    mask = make_mask("ragged")
    assert mask.grid == (3, 4)
    assert mask.batch_size == 4
    assert mask.num_blocks == 48
    assert mask.num_visible == 7 + 0 + 12 + 2
    assert mask.density == 21 / 48
    assert mask.device == torch.device("cpu")
    assert all(isinstance(size, int) for size in (*mask.grid, mask.batch_size, mask.num_visible))


@pytest.mark.parametrize("name", MASKS)
def test_numbers_of_an_image(name):
    counts = MASKS[name].flatten(1).sum(1).tolist()
    mask = make_mask(name)
    unknown = ck.BlockMask(mask.visible, mask.block_index)
    for each in (mask, unknown, copy.deepcopy(mask), mask.to("cpu")):
        assert (each.min_per_image, each.max_per_image) == (min(counts), max(counts))
    assert unknown.visible_per_image is None
    index = [image for image, count in enumerate(counts) for _ in range(count)]
    assert mask.image_index.dtype == torch.int64
    assert mask.image_index.tolist() == index


def test_numbers_without_images():
    none = torch.ones(0, 3, 4, dtype=torch.bool)
    masks = [ck.BlockMask.from_visible(none), ck.BlockMask(none, torch.zeros(0).long())]
    for mask in masks:
        assert (mask.min_per_image, mask.max_per_image) == (0, 0)
        assert mask.image_index.shape == (0,)


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("name", MASKS)
def test_neighbours_against_a_loop(name, radius):
    mask = make_mask(name)
    gh, gw = mask.grid
    rows = {block: row for row, block in enumerate(mask.block_index.tolist())}
    expected = []
    for block in rows:
        image, row, column = block // (gh * gw), block // gw % gh, block % gw
        for i in range(row - radius, row + radius + 1):
            for j in range(column - radius, column + radius + 1):
                inside = 0 <= i < gh and 0 <= j < gw
                expected.append(rows.get((image * gh + i) * gw + j, -1) if inside else -1)
    table = mask.neighbours(radius)
    assert table.dtype == torch.int32
    assert table.is_contiguous()
    assert table.shape == (mask.num_visible, (2 * radius + 1) ** 2)
    assert table.flatten().tolist() == expected
    middle = table[:, table.shape[1] // 2]
    assert middle.tolist() == list(range(mask.num_visible))


@pytest.mark.parametrize("side", BLOCK_SIZES)
def test_to_dense(side):
    mask = make_mask("ragged")
    dense = mask.to_dense(side)
    assert dense.shape == (4, 1, 3 * side, 4 * side)
    assert dense.dtype == torch.bool
    rows, columns = torch.arange(3 * side) // side, torch.arange(4 * side) // side
    assert torch.equal(dense[:, 0], mask.visible[:, rows][:, :, columns])


def test_to_another_device():
    mask = make_mask("ragged").to("meta")
    assert mask.device.type == "meta"
    assert {leaf.device.type for leaf in pytree.tree_leaves(mask)} == {"meta"}
    assert (mask.grid, mask.batch_size, mask.num_visible) == ((3, 4), 4, 21)
    assert same(make_mask("ragged").to("cpu"), make_mask("ragged"))


def test_print_draws_the_mask():
    mask = make_mask("equal")
    assert repr(mask) == (
        "BlockMask(batch_size=2, grid=(3, 4), num_visible=8, density=0.333, device=cpu)"
    )
    assert str(mask).splitlines() == [repr(mask), "#..#  .##.", ".#..  ....", "..#.  #.#."]
    assert len(str(ck.BlockMask.random(64, (14, 14), 0.75)).splitlines()) == 15


def test_pytree_round_trip():
    mask = make_mask("equal")
    leaves, spec = pytree.tree_flatten({"mask": mask, "x": 1})
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves[:-1])
    again = pytree.tree_unflatten(leaves, spec)["mask"]
    assert isinstance(again, ck.BlockMask)
    assert same(again, mask)
    assert torch.equal(again.neighbours(1), mask.neighbours(1))
    assert pytree.tree_map(lambda leaf: leaf.to("meta"), mask).device.type == "meta"
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(mask)[0]]
    assert paths[:2] == [".visible", ".block_index"]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    ragged = pytree.tree_structure(make_mask("ragged"))
    assert pytree.treespec_loads(pytree.treespec_dumps(ragged)) == ragged


def test_a_pytree_keeps_what_the_mask_knows():
    mask = make_mask("ragged")
    leaves, spec = pytree.tree_flatten(mask)
    loaded = pytree.treespec_loads(pytree.treespec_dumps(spec))
    for again in (
        pytree.tree_unflatten(leaves, spec),
        pytree.tree_unflatten(leaves, loaded),
        pytree.tree_map(lambda leaf: leaf.to("meta"), mask),  # where nothing can be read
        mask.to("meta"),
    ):
        assert again.visible_per_image is None
        assert (again.min_per_image, again.max_per_image) == (0, 12)
    unknown = pytree.tree_structure(ck.BlockMask(mask.visible, mask.block_index))
    assert unknown != spec
    assert pytree.treespec_loads(pytree.treespec_dumps(unknown)) == unknown


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(clone):
    assert same(clone(make_mask("ragged")), make_mask("ragged"))


@pytest.mark.parametrize("weights_only", [True, False])
def test_saved_and_loaded(tmp_path, weights_only):
    """What the host knows is found again; nothing but `visible` is taken from the file."""
    known, unknown = make_mask("equal"), make_mask("ragged")
    unknown = ck.BlockMask(unknown.visible, unknown.block_index)
    file = tmp_path / "masks.pt"
    torch.save({"known": known, "list": [unknown]}, file)
    loaded = torch.load(file, weights_only=weights_only)
    assert loaded["known"].visible_per_image == known.visible_per_image
    for found, mask in ((loaded["known"], known), (loaded["list"][0], unknown)):
        assert torch.equal(found.visible, mask.visible)
        assert torch.equal(found.block_index, mask.block_index)
        assert torch.equal(found.neighbours(), mask.neighbours())
        assert found.min_per_image == mask.min_per_image


class Sample(torch.utils.data.Dataset):
    """An image and its mask; later ones have fewer visible blocks."""

    def __getitem__(self, index):
        if index > 3:
            raise IndexError
        visible = torch.arange(6).view(1, 2, 3) >= index
        return torch.full((1,), float(index)), ck.BlockMask.from_visible(visible)

    def __len__(self):
        return 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_joins_the_masks_of_samples(workers):
    loader = torch.utils.data.DataLoader(Sample(), batch_size=4, num_workers=workers)
    ((numbers, mask),) = loader
    assert numbers.flatten().tolist() == [0, 1, 2, 3]
    expected = torch.stack([torch.arange(6).view(2, 3) >= i for i in range(4)])
    assert torch.equal(mask.visible, expected)
    assert torch.equal(mask.neighbours(), ck.BlockMask.from_visible(expected).neighbours())


def test_masks_of_other_grids_are_not_joined():
    masks = [ck.BlockMask.full(1, (2, 3)), ck.BlockMask.full(1, (3, 2))]
    with pytest.raises(ValueError, match="same grid of blocks, got 2 x 3, 3 x 2"):
        torch.utils.data.default_collate(masks)


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan")])
def test_mask_ratio_outside_its_range(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got"):
        ck.BlockMask.random(2, (3, 4), ratio)
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got"):
        ck.BlockMask.from_noise(torch.rand(2, 12), (3, 4), ratio)


@pytest.mark.parametrize("grid", [(0, 4), (3, 0), (-1, 4)])
def test_empty_grid(grid):
    with pytest.raises(ValueError, match="grid must have at least one block"):
        ck.BlockMask.random(2, grid, 0.5)
    with pytest.raises(ValueError, match="grid must have at least one block"):
        ck.BlockMask.full(2, grid)
    if min(grid) >= 0:
        with pytest.raises(ValueError, match="grid must have at least one block"):
            ck.BlockMask.from_visible(torch.ones(2, *grid, dtype=torch.bool))


@pytest.mark.parametrize("grid", [14, (14,), (2, 2, 2)])
def test_grid_is_a_pair(grid):
    with pytest.raises(TypeError, match=r"grid must be \(gh, gw\), got"):
        ck.BlockMask.random(2, grid, 0.5)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="batch_size must not be negative, got -1"):
        ck.BlockMask.random(-1, (3, 4), 0.5)
    with pytest.raises(TypeError, match="noise must be a floating tensor, got torch.int64"):
        ck.BlockMask.from_noise(torch.ones(2, 12, dtype=torch.int64), (3, 4), 0.5)
    with pytest.raises(TypeError, match="noise must be a floating tensor, got list"):
        ck.BlockMask.from_noise([[0.5]], (1, 1), 0.5)
    for shape in [(2, 11), (12,), (2, 3, 4)]:
        with pytest.raises(ValueError, match=r"noise must be \[B, 12\] for a grid of 3 x 4, got"):
            ck.BlockMask.from_noise(torch.rand(shape), (3, 4), 0.5)
    with pytest.raises(TypeError, match="visible must be a bool tensor.*got torch.float32"):
        ck.BlockMask.from_visible(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="visible must be a bool tensor.*got list"):
        ck.BlockMask.from_visible([[[True]]])
    with pytest.raises(ValueError, match=r"visible must be \[B, gh, gw\], got \[3, 4\]"):
        ck.BlockMask.from_visible(torch.ones(3, 4, dtype=torch.bool))
    good = torch.tensor([[0, 1]])
    with pytest.raises(TypeError, match="ids must be a tensor of integers, got list"):
        ck.BlockMask.from_ids([[0]], (3, 4))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"ids must be a tensor of integers, got {dtype}"):
            ck.BlockMask.from_ids(good.to(dtype), (3, 4))
    for shape in [(2,), (1, 2, 2), (2, 13)]:
        with pytest.raises(ValueError, match=r"ids must be \[B, K\] with K at most 12 for .* got"):
            ck.BlockMask.from_ids(torch.zeros(shape, dtype=torch.int64), (3, 4))
    for wrong in (-1, 12):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, 12\), .* got {wrong}"):
            ck.BlockMask.from_ids(torch.tensor([[0, wrong]]), (3, 4))
    with pytest.raises(ValueError, match="ids must be different .* within an image, got one twice"):
        ck.BlockMask.from_ids(torch.tensor([[3, 5], [4, 4]]), (3, 4))
    with pytest.raises(TypeError, match=r"grid must be \(gh, gw\), got 12"):
        ck.BlockMask.from_ids(good, 12)
    with pytest.raises(ValueError, match="radius must not be negative, got -1"):
        make_mask("one").neighbours(-1)


@pytest.mark.parametrize(
    ("blocks", "ratio", "floor", "rounded"),
    [(49, 0.6, 19, 20), (9, 0.6, 3, 4), (64, 0.6, 25, 26), (16, 0.6, 6, 6), (10, 0.75, 2, 2)],
)
def test_rounding(blocks, ratio, floor, rounded):
    """As MAE and as SparK round; 2.5 is half between, and goes to the even number."""
    noise = torch.rand(2, blocks)
    for rounding, kept in (("floor", floor), ("round", rounded)):
        mask = ck.BlockMask.from_noise(noise, (1, blocks), ratio, rounding)
        assert mask.visible_per_image == kept
        order = noise.argsort(dim=1)[:, :kept].sort(dim=1).values
        assert torch.equal(mask.visible[:, 0].nonzero()[:, 1].view(2, kept), order)
        drawn = ck.BlockMask.random(2, (1, blocks), ratio, rounding=rounding)
        assert drawn.visible_per_image == kept
    assert ck.BlockMask.from_noise(noise, (1, blocks), ratio).visible_per_image == floor


def test_an_unknown_rounding():
    with pytest.raises(ValueError, match='rounding must be "floor" or "round", got .ceil.'):
        ck.BlockMask.from_noise(torch.rand(1, 4), (2, 2), 0.5, "ceil")
