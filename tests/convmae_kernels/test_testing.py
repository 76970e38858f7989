"""The test helpers themselves: a budget that rejects nothing would be worthless."""

import pytest
import torch

from convmae_kernels.testing import (
    LAYOUTS,
    MASKS,
    assert_within_budget,
    dense_masked_conv2d,
    implementations,
    make_mask,
    oracle,
    with_layout,
)

NAN = float("nan")


def test_layouts_hold_what_they_promise():
    x = torch.arange(24.0).view(2, 3, 4)
    for layout in LAYOUTS:
        y = with_layout(x, layout)
        assert y.is_contiguous() == (layout == "contiguous")
        assert torch.equal(y, x[:1].expand_as(x) if layout == "expanded" else x)
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="layout must be one of"):
        with_layout(x, "diagonal")


def test_the_budget_rejects_errors():
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    plain = exact.bfloat16()
    assert_within_budget(plain, exact, plain, exact)
    for wrong in (
        plain + 0.03,
        torch.where(exact > 0.99, NAN, plain),
        plain.float(),
        plain.view(1, 101),
    ):
        with pytest.raises(AssertionError):
            assert_within_budget(wrong, exact, plain, exact)


def test_what_the_budget_allows():
    exact = torch.full((7,), 1 / 3, dtype=torch.float64)
    plain = exact.float()
    eps = torch.finfo(torch.float32).eps
    for error, passes in ((0.3 * eps, True), (3 * eps, False), (NAN, False)):
        actual = plain.clone()
        actual[3] += error
        if passes:
            assert_within_budget(actual, exact, plain, exact)
        else:
            with pytest.raises(AssertionError, match="gradient errs by"):
                assert_within_budget(actual, exact, plain, exact, "gradient")
    worse = plain + 2 * eps  # plain PyTorch errs too: twice as much is allowed
    assert_within_budget(plain + 4 * eps, exact, worse, exact)
    assert_within_budget(plain + 4 * eps, exact, plain, 20 * exact)  # sums of large terms
    assert_within_budget(plain[:0], exact[:0], plain[:0], exact[:0])


def test_implementations_are_found():
    names = implementations()
    assert names[0] == "reference"
    assert len(names) >= 2
    assert implementations("meta") == ("reference", "auto")


@pytest.mark.parametrize("name", MASKS)
def test_the_dense_counterpart_ignores_hidden_positions(name):
    mask = make_mask(name)
    x = torch.ones(mask.num_visible, 4, 1, dtype=torch.float64)
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    for found in (dense_masked_conv2d(x, weight, None, mask), oracle(x, weight, None, mask)):
        assert found.sum() == count_pairs(mask.to_dense(2)[:, 0].tolist())


def count_pairs(images):
    """How many pairs of visible positions lie in each other's 3 x 3 window, counted by a loop."""
    total = 0
    for rows in images:
        spots = {(i, j) for i, row in enumerate(rows) for j, seen in enumerate(row) if seen}
        total += sum(
            (i + a, j + b) in spots for i, j in spots for a in (-1, 0, 1) for b in (-1, 0, 1)
        )
    return total
