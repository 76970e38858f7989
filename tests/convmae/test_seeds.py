"""Seeds: every draw of a run has its own, whatever its stream and its keys."""

import itertools
import re
from pathlib import Path

import pytest
import torch

import convmae
from convmae.seeds import Stream, derive_seed, generator_for, mask_noise, seeded

WORD, LARGEST = 2**32, 2**64 - 1


def test_no_two_draws_share_a_seed():
    """All streams, no key to three keys, zeros at the end, numbers of one and of two words."""
    values = (0, 1, 2, 7, WORD, WORD + 1, LARGEST)
    draws = [
        (seed, stream, *keys)
        for seed in (0, 1, WORD, LARGEST)
        for stream in Stream
        for count in range(4)
        for keys in itertools.product(values, repeat=count)
    ]
    seeds = {derive_seed(*draw) for draw in draws}
    assert len(draws) == 4 * len(Stream) * (1 + 7 + 49 + 343) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("stream", Stream)
def test_zeros_at_the_end_make_another_seed(stream):
    """NumPy's `SeedSequence`, for one, gives `[0, 1, 7]` and `[0, 1, 7, 0]` the same state."""
    assert derive_seed(0, stream, 7) != derive_seed(0, stream, 7, 0)
    assert derive_seed(0, stream) != derive_seed(0, stream, 0) != derive_seed(0, stream, 0, 0)


def test_the_crop_of_a_sample_and_the_order_of_an_epoch_differ():
    epochs, samples = range(20), range(20)
    crops = {derive_seed(0, Stream.SAMPLE, e, s) for e in epochs for s in samples}
    orders = {derive_seed(0, Stream.ORDER, epoch) for epoch in epochs}
    assert not crops & orders and len(crops) == 400 and len(orders) == 20


def test_seeds_stay_what_they_are():
    """A change here changes every run of the same seed: then `SCHEME` has to change as well."""
    assert derive_seed(0, Stream.CHOICE) == 4273803895383222415
    assert derive_seed(1, Stream.SAMPLE, 2, 3) == 1206561076718152742


@pytest.mark.parametrize("keys", [(-1,), (LARGEST + 1,), (0, -3)])
def test_keys_out_of_range_are_refused(keys):
    with pytest.raises(ValueError, match=r"from 0 to 2\*\*64 - 1, got 5 and \(" + str(keys[0])):
        derive_seed(5, Stream.SAMPLE, *keys)


def test_streams_are_numbered_once():
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)


def test_every_seed_is_of_the_table():
    """No file but `seeds.py` seeds anything by itself, except the weights of a new model."""
    allowed = {
        "seeds.py",
        "training/setup.py",  # the weights of a new model
        "weights/conversion.py",  # layers that a file does not have
        "weights/network_conversion.py",  # the same of networks of timm
        "commands/onnx_file.py",  # pictures to compare a file's outputs on
    }
    package = Path(convmae.__file__).parent
    seeding = re.compile(r"manual_seed|SeedSequence|default_rng|random\.seed")
    found = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if seeding.search(file.read_text())
    }
    assert found == allowed


def test_mask_noise_is_of_each_sample_alone():
    keys = torch.tensor([[0, 5], [1, 2], [0, 6]])
    noise = mask_noise(keys, 9, seed=3)
    assert noise.shape == (3, 9) and len(set(noise.flatten().tolist())) == 27
    assert torch.equal(noise[1:2], mask_noise(keys[1:2], 9, seed=3))
    assert not torch.equal(noise, mask_noise(keys, 9, seed=3, stream=Stream.PICTURE))
    expected = torch.rand(9, generator=generator_for(3, Stream.MASK, 1, 2))
    assert torch.equal(noise[1], expected)


def test_seeded_puts_the_states_back():
    before = torch.get_rng_state()
    with seeded(4):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(4):
        assert torch.equal(torch.rand(3), first)
