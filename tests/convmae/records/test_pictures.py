"""Pictures of reconstructions: any channels, any type of numbers, any statistics."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import convmae
from convmae.records.pictures import loss_picture, reconstruction_picture, save_picture

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")

SIZE, SCALE, HEADER, GAP = 32, 6, 26, 6  # a picture of 32 pixels is enlarged to 192


def model_of(channels: int, **options: Any) -> convmae.ConvMAE:
    return convmae.create_model("convmae_tiny", img_size=SIZE, in_chans=channels, **options)


def ramp(channels: int) -> torch.Tensor:
    """`[2, C, 32, 32]` in [0, 1]: channel c rises with the columns, to (c + 1) / C."""
    row = torch.linspace(0, 1, SIZE).expand(2, 1, SIZE, SIZE)
    return row * torch.arange(1, channels + 1).view(1, channels, 1, 1) / channels


def draw(images: torch.Tensor, **options: Any) -> tuple[np.ndarray, int]:
    """The columns of the sheet `[4, N, 32, 32, 3]`, small again, and the pixels below them."""
    channels = images.shape[1]
    statistics = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    model = model_of(channels, norm_pix_loss=options.pop("norm_pix_loss", False))
    sheet = np.asarray(reconstruction_picture(model, images, 0.5, 0, **(statistics | options)))
    side = SIZE * SCALE
    columns = [
        [
            sheet[top : top + side : SCALE, left : left + side : SCALE]
            for top in range(HEADER, HEADER + len(images) * (side + GAP), side + GAP)
        ]
        for left in range(GAP, GAP + 4 * (side + GAP), side + GAP)
    ]
    footer = sheet.shape[0] - (HEADER + len(images) * (side + GAP) + GAP)
    return np.array(columns), footer


def stretched(band: torch.Tensor) -> np.ndarray:
    """What must be drawn of a band `[N, 32, 32]` that is stretched."""
    flat = band.double().flatten(1).numpy()
    low, high = np.percentile(flat, [2, 98], axis=1)[..., None]
    return (((flat - low) / (high - low)).clip(0, 1) * 255).reshape(band.shape)


def test_eight_bits_are_drawn_as_they_are() -> None:
    for channels, bands in ((1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2])):
        images = (ramp(channels) * 255).round().byte()
        columns, footer = draw(images)
        wanted = images[:, bands].permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(columns[0], wanted)
        assert footer == (22 if channels == 2 else 0)  # which of two channels must be said


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_numbers_are_stretched(dtype: torch.dtype, channels: int) -> None:
    """12 bits in 16, or degrees: at full scale one would see nothing."""
    values = ramp(channels)
    stored = (values * 4095).to(dtype) if dtype == torch.uint16 else values * 40 + 280
    statistics = (0.03, 0.02) if dtype == torch.uint16 else (300.0, 12.0)
    mean, std = ((value,) * channels for value in statistics)
    columns, footer = draw(stored, mean=mean, std=std)
    assert footer == 22
    for band in range(3):
        wanted = stretched(stored[:, min(band, channels - 1)].float())
        np.testing.assert_allclose(columns[0][..., band], wanted, atol=1)


@pytest.mark.parametrize("bands", [None, (4, 2, 0)])
def test_many_channels_are_drawn_in_false_colour(bands: tuple[int, int, int] | None) -> None:
    images = (torch.rand(2, 5, SIZE, SIZE) * 255).byte()
    columns, footer = draw(images, bands=bands)
    assert footer == 40  # two notes
    for index, band in enumerate(bands or (0, 1, 2)):
        wanted = stretched(images[:, band].float())
        np.testing.assert_allclose(columns[0][..., index], wanted, atol=1)


def test_visible_patches_are_the_originals_and_hidden_ones_the_mean() -> None:
    images = (ramp(3) * 255).round().byte()
    columns, _ = draw(images, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))
    original, masked, _, pasted = columns
    hidden = (masked == np.array([51, 102, 153])).all(-1)
    assert hidden.reshape(2, 2, 16, 2, 16).all((2, 4)).sum() == 4  # of 8 patches, half
    np.testing.assert_array_equal(masked[~hidden], original[~hidden])
    np.testing.assert_array_equal(pasted[~hidden], original[~hidden])
    assert (pasted[hidden] != original[hidden]).any()


def test_the_model_sees_what_it_was_trained_on() -> None:
    """Statistics and full scale reach the model: its input has the mean and deviation wanted."""
    seen: list[torch.Tensor] = []
    model = model_of(2)
    reconstruct = model.reconstruct

    def noting(inputs: torch.Tensor, **options: Any) -> Any:
        seen.append(inputs)
        return reconstruct(inputs, **options)

    model.reconstruct = noting  # type: ignore[method-assign]
    stored = torch.tensor([0, 65535], dtype=torch.uint16).view(1, 2, 1, 1).expand(1, 2, SIZE, SIZE)
    reconstruction_picture(model, stored, 0.5, 0, mean=(0.5, 0.25), std=(0.5, 0.1))
    (inputs,) = seen
    assert inputs.dtype == torch.float32
    assert inputs[0, 0].unique().tolist() == [-1.0]
    assert inputs[0, 1].unique().tolist() == pytest.approx([7.5])


def test_notes_add_up_and_missing_values_are_black() -> None:
    images = torch.rand(1, 4, SIZE, SIZE)
    images[0, 0, 0, 0] = torch.nan
    columns, footer = draw(images, norm_pix_loss=True)
    assert footer == 58  # false colour, stretched, norm_pix_loss
    assert columns[0, 0, 0, 0, 0] == 0
    assert columns[0].std() > 20


@pytest.mark.parametrize("bands", [(0, 1, 4), (0, 1), (-1, 0, 1)])
def test_bands_that_are_not_there(bands: Any) -> None:
    with pytest.raises(ValueError, match=r"bands must be three of the channels 0 to 3, got \("):
        draw(torch.rand(1, 4, SIZE, SIZE), bands=bands)


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("kind", ["reconstruction", "loss"])
def test_a_disk_that_refuses_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, kind: str
) -> None:
    path = tmp_path / "pictures" / "picture.png"

    def write(value: int) -> None:
        if kind == "loss":
            loss_picture([{"step": 1, "loss": value}, {"step": 2, "loss": 0.5}], path)
        else:
            save_picture(Image.new("RGB", (8, 8), (value, 0, 0)), path)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    path.parent.mkdir()
    write(1)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises(OSError, match="No space left"):
            write(2)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    write(2)
    assert path.read_bytes() != before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("size", [(512, 16), (16, 512), (16, 16)])
def test_labels_fit_their_columns(size: tuple[int, int]) -> None:
    """White cells: what is dark above them is a label, apart from its neighbours and the edges."""
    from convmae.records.pictures import _sheet

    cells = [np.full((1, *size, 3), 255, dtype=np.uint8)] * 4
    sheet = np.asarray(_sheet(cells, 0.75, []).convert("L"))
    inked = (sheet < 128).any(axis=0)
    assert not inked[:2].any() and not inked[-2:].any()
    edges = np.linspace(0, sheet.shape[1], 5).round().astype(int)
    for edge in edges[1:-1]:
        assert not inked[edge - 2 : edge + 2].any()
    assert all(inked[low:high].any() for low, high in zip(edges[:-1], edges[1:], strict=True))


def test_pictures_of_many_pixels_are_stretched() -> None:
    """`torch.nanquantile` refuses more than 2**24 values."""
    from convmae.records.pictures import _stretch

    ramp = torch.linspace(-5, 3, 2400 * 2400).view(1, 1, 2400, 2400).expand(1, 3, -1, -1)
    (shown,) = _stretch([ramp])
    assert float((shown < 0).float().mean()) == pytest.approx(0.02, abs=1e-3)
    assert float((shown > 1).float().mean()) == pytest.approx(0.02, abs=1e-3)


def test_losses_that_are_no_number_are_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    loss_picture([{"step": 1, "loss": None}], path)
    assert not path.exists()
    finite = [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 0.5}]
    loss_picture([*finite, {"step": 2, "loss": None}, {"step": 4, "loss": float("nan")}], path)
    both = path.read_bytes()
    loss_picture(finite, path)
    assert path.read_bytes() == both
